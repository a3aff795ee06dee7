"""Validated requests of visitors, and the progress of their jobs."""

from collections.abc import Mapping
import dataclasses
import io
import secrets
from typing import Any

import numpy as np
from PIL import Image

from ssd_jax.core.config import UserError, check
from ssd_jax.core.prompts import clean
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding import registry
from ssd_jax.decoding.ar import AR

_KEYS = ("prompt", "decoder", "seed", "guidance", "images", "race")
_LARGEST_SEED = 2**31 - 1_000  # image indices are int32


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of requests to a machine that several visitors share.

  Attributes:
    prompt: Most characters of a prompt.
    images: Most images of a request.
    waiting: Most waiting requests; further requests are refused.
    kept: Most requests whose images are kept.
    decoders: Most decoder settings whose programs stay compiled.
    guidance: Largest guidance scale.
  """

  prompt: int = 300
  images: int = 4
  waiting: int = 256
  kept: int = 256
  decoders: int = 24
  guidance: float = 20.0


@dataclasses.dataclass(frozen=True)
class Request:
  """A request for images.

  Attributes:
    prompt: The cleaned prompt.
    label: Decoder spec as the visitor wrote it.
    decoder: Settings of the decoder.
    seed: Index of the first image in a call with seed 0; the others follow.
    guidance: Guidance scale; None for the model's.
    images: Number of images.
    race: Whether AR generates the same images for comparison.
  """

  prompt: str
  label: str
  decoder: Decoder
  seed: int
  guidance: float | None
  images: int
  race: bool

  @property
  def group(self) -> tuple:
    """Key of the requests that may be generated together."""
    return self.decoder, self.guidance, self.race


def parse(
    values: Any, limits: Limits, tokens: int,
    known: Mapping[str, type] = registry.DECODERS,
) -> Request:
  """Returns the request in a visitor's JSON.

  Args:
    values: Parsed JSON of any type.
    limits: Limits of requests.
    tokens: Tokens of an image, the largest number in a decoder's settings.
    known: Decoders by name.

  Raises:
    UserError: if the JSON is not a valid request.
  """
  if not isinstance(values, dict) or set(values) - set(_KEYS):
    raise UserError(f"Expected a request with the keys {_KEYS}, got another "
                    "kind of request. Reload the page.")
  prompt = clean(_of(values, "prompt", str, ""), limits.prompt)
  label = _of(values, "decoder", str, "ar").strip()
  check(len(label) <= 120, "decoder", f"{len(label)} characters",
        "at most 120 characters")
  decoder = registry.parse(label, known)
  for key, value in vars(decoder).items():
    for number in value if isinstance(value, (list, tuple)) else [value]:
      if isinstance(number, (int, float)):
        check(abs(number) <= tokens, key, number,
              f"at most the {tokens} tokens")
  seed = _of(values, "seed", int, 0)
  check(0 <= seed <= _LARGEST_SEED, "seed", seed, f"in [0, {_LARGEST_SEED}]")
  images = _of(values, "images", int, 1)
  check(1 <= images <= limits.images, "images", images,
        f"1 to {limits.images}")
  guidance = values.get("guidance")
  if guidance is not None:
    guidance = float(_of(values, "guidance", (int, float), 1.0))
    check(0 <= guidance <= limits.guidance, "guidance", guidance,
          f"0 to {limits.guidance:g}")
  race = _of(values, "race", bool, True) and decoder != AR()
  return Request(prompt, label, decoder, seed, guidance, images, race)


def _of(values: dict, key: str, kind: Any, default: Any) -> Any:
  value = values.get(key, default)
  is_right = isinstance(value, kind) and (
      kind is bool or not isinstance(value, bool))
  words = {str: "text", int: "a whole number", bool: "true or false"}
  check(is_right, key, repr(value)[:40], words.get(kind, "a number"))
  return value


@dataclasses.dataclass
class Picture:
  """One image of a lane, finished or in progress.

  Attributes:
    commit: int [R, C], pass in which a token became final; 0 if it is not.
    png: PNG of the image so far; None before the first.
    version: Number of PNGs so far.
  """

  commit: np.ndarray
  png: bytes | None = None
  version: int = 0

  def paint(self, image: np.ndarray) -> None:
    """Encodes `image`, uint8 [H, W, 3], as the new PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=3)
    self.png, self.version = file.getvalue(), self.version + 1


@dataclasses.dataclass
class Lane:
  """The images of one decoder for a request.

  Attributes:
    label: Label of the decoder.
    lossless: Whether the decoder is lossless.
    pictures: One entry per image.
    state: waiting, compiling, drawing or done.
    passes: Passes of the first image so far.
    seconds: Seconds from the first to the last pass of the batch; None before.
    together: Images in the batch.
  """

  label: str
  lossless: bool
  pictures: list[Picture]
  state: str = "waiting"
  passes: int = 0
  seconds: float | None = None
  together: int = 1


@dataclasses.dataclass
class Job:
  """A submitted request.

  Attributes:
    request: The request.
    lanes: Lane of the decoder, then of AR if they race.
    id: Random id that cannot be guessed.
    state: queued, drawing, done or failed.
    error: One line if the job failed.
    notes: What the visitor should know about the prompt.
  """

  request: Request
  lanes: list[Lane]
  id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
  state: str = "queued"
  error: str = ""
  notes: tuple[str, ...] = ()

  def report(self, ahead: int) -> dict[str, Any]:
    """Returns JSON for the page.

    Args:
      ahead: Number of requests that are generated before this one.
    """
    lanes = [
        dict(label=lane.label, lossless=lane.lossless, state=lane.state,
             passes=lane.passes, seconds=lane.seconds, together=lane.together,
             pictures=[
                 dict(commit=p.commit.tolist(), version=p.version,
                      url=self._url(lane_at, i) if p.png else None)
                 for i, p in enumerate(lane.pictures)])
        for lane_at, lane in enumerate(self.lanes)]
    r = self.request
    return dict(
        id=self.id, state=self.state, error=self.error, ahead=ahead,
        notes=list(self.notes), lanes=lanes, prompt=r.prompt, decoder=r.label,
        seed=r.seed, guidance=r.guidance, images=r.images, race=r.race)

  def _url(self, lane: int, index: int) -> str:
    version = self.lanes[lane].pictures[index].version
    return f"/pictures/{self.id}/{lane}/{index}.png?v={version}"
