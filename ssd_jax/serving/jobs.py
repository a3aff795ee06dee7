"""What a visitor asks for, checked, and what came of it so far."""

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
_LARGEST_SEED = 2**31 - 1_000  # indices of images are int32


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one visitor may ask of a machine that several share.

  Attributes:
    prompt: Characters.
    images: Of a request.
    waiting: Requests that wait; more are turned away.
    kept: Requests whose images are kept.
    decoders: Different settings whose programs stay compiled.
    guidance: Largest scale.
  """

  prompt: int = 300
  images: int = 4
  waiting: int = 256
  kept: int = 256
  decoders: int = 24
  guidance: float = 20.0


@dataclasses.dataclass(frozen=True)
class Request:
  """Images to be generated.

  Attributes:
    prompt: Cleaned.
    label: Of the decoder, as it was asked for.
    decoder: Its settings.
    seed: The index of the first image in a call of seed 0; the next follow.
    guidance: Scale, None for the model's.
    images: How many.
    race: Whether AR generates the same beside it.
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
    """Requests that agree in this are generated together."""
    return self.decoder, self.guidance, self.race


def parse(
    values: Any, limits: Limits, cells: int,
    known: Mapping[str, type] = registry.DECODERS,
) -> Request:
  """The request that a visitor's JSON makes.

  Args:
    values: Parsed JSON, of any kind.
    limits: Of what may be asked.
    tokens: Of an image: no number of a decoder's settings is larger.
    known: Decoders by name.

  Raises:
    UserError: on anything else than a request.
  """
  if not isinstance(values, dict) or set(values) - set(_KEYS):
    raise UserError(f"Expected {_KEYS}, got another kind of request. Reload "
                    "the page.")
  prompt = clean(_of(values, "prompt", str, ""), limits.prompt)
  label = _of(values, "decoder", str, "ar").strip()
  check(len(label) <= 120, "decoder", f"{len(label)} characters",
        "at most 120 characters")
  decoder = registry.parse(label, known)
  for key, value in vars(decoder).items():
    for number in value if isinstance(value, (list, tuple)) else [value]:
      if isinstance(number, (int, float)):
        check(abs(number) <= cells, key, number, f"at most the {cells} tokens")
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
  """One image of a lane, as far as it is.

  Attributes:
    commit: int [R, C], the pass at which a token became final, 0 for not yet.
    png: Of the image so far, or of the whole one; None before that.
    version: Rises with every new PNG.
  """

  commit: np.ndarray
  png: bytes | None = None
  version: int = 0

  def paint(self, image: np.ndarray) -> None:
    """Takes uint8 [H, W, 3] as its image."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=3)
    self.png, self.version = file.getvalue(), self.version + 1


@dataclasses.dataclass
class Lane:
  """What one decoder generates for a request.

  Attributes:
    label: Of the decoder.
    lossless: Whether it keeps AR's distribution.
    images: One per image.
    state: waiting, compiling, drawing or done.
    passes: Of the first image, so far.
    seconds: From the first pass to the last of the batch; None before.
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
  """A request on its way.

  Attributes:
    request: What was asked.
    lanes: The decoder's, then AR's where they race.
    id: Cannot be guessed.
    state: queued, drawing, done or failed.
    error: One line, where it failed.
    notes: What the visitor should know of the prompt.
  """

  request: Request
  lanes: list[Lane]
  id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
  state: str = "queued"
  error: str = ""
  notes: tuple[str, ...] = ()

  def report(self, ahead: int) -> dict[str, Any]:
    """JSON for the page; `ahead` requests are generated before it."""
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
