"""Requests of OpenAI's Images API, checked, and the errors that it answers.

What changes the picture and cannot be honoured is refused; what does not, is
ignored, as are unknown fields, so that newer clients go on working.
"""

from collections.abc import Callable, Mapping
import dataclasses
import secrets
from typing import Any, cast

from ssd_jax.core.config import UserError
from ssd_jax.core.prompts import clean
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding.sampling import Overrides
from ssd_jax.pipeline import arguments

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITIES = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
MOST_PARTIALS = 3
SEEDS = 2**32
# What would change the picture and is not to be had.
REFUSED = ("svg", "frame_count", "frame_duration_ms", "negative_prompt",
           "num_inference_steps", "image", "mask")

_SAMPLING = {"guidance_scale": "guidance", "temperature": "temperature",
             "top_k": "top_k", "top_p": "top_p"}  # fields, and what they set
_NO_SAMPLING = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class ApiError(Exception):
  """An error in the API's shape, sent to the client.

  Attributes:
    status: HTTP status.
    kind: The API's type of error.
    param: Field that is at fault, or None.
    code: Machine-readable code, or None.
    retry_after: Seconds after which another try makes sense; None where it
      makes none.
  """

  def __init__(
      self, status: int, message: str, kind: str = "invalid_request_error",
      param: str | None = None, code: str | None = None,
      retry_after: int | None = None,
  ):
    super().__init__(message)
    self.status, self.kind, self.param = status, kind, param
    self.code, self.retry_after = code, retry_after

  def body(self) -> dict[str, Any]:
    """Returns the error object."""
    return {"error": {"message": str(self), "type": self.kind,
                      "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of requests to a machine that many clients share.

  Attributes:
    prompt: Most characters of a prompt.
    images: Most images of a request.
    waiting: Most waiting images; further requests are refused.
    body: Most bytes of a request's body.
    seconds: Time after which a request is given up.
    lanes: Most decoders and kinds of settings whose programs are kept.
  """

  prompt: int = 4_000
  images: int = 10
  waiting: int = 256
  body: int = 65_536
  seconds: float = 300.0
  lanes: int = 16


@dataclasses.dataclass(frozen=True)
class Served:
  """What a server offers.

  Attributes:
    names: Names of the model; the first is its own, others are aliases.
    size: Its images, "WIDTHxHEIGHT".
    decoders: Decoder by the name that a request gives; the first is default.
    parse: Parses any other decoder, or None where only those are served.
    limits: Limits of requests.
  """

  names: tuple[str, ...]
  size: str
  decoders: Mapping[str, Decoder]
  parse: Callable[[str], Decoder] | None = None
  limits: Limits = Limits()


@dataclasses.dataclass(frozen=True)
class ImageRequest:
  """A request for images.

  Attributes:
    prompt: The cleaned prompt.
    decoder: Settings of the decoder.
    label: The decoder as the client named it.
    images: Number of images.
    seed: Seed; image i is image i of `generate` with this seed.
    sampling: Settings of the target distribution that the request gives.
    output_format: "png", "jpeg" or "webp".
    quality: Quality of a lossy file, 1 to 100.
    as_url: Whether the reply holds URLs instead of bytes.
    stream: Whether events are sent as they come.
    partial_images: Unfinished images to send before each finished one.
    progress: Whether to send the order of commits after every few passes.
    client: Key by which clients take turns.
  """

  prompt: str
  decoder: Decoder
  label: str
  images: int
  seed: int
  sampling: Overrides
  output_format: str
  quality: int
  as_url: bool
  stream: bool
  partial_images: int
  progress: bool
  client: str


def parse(values: Any, served: Served, client: str) -> ImageRequest:
  """Returns the request in a client's JSON.

  Args:
    values: Parsed JSON of any type; null fields are fields not given.
    served: What the server offers.
    client: Who asks, if the request does not say.

  Raises:
    ApiError: if it is not a valid request.
  """
  if not isinstance(values, dict):
    raise ApiError(400, "Expected a JSON object with a prompt, got another "
                        "kind of JSON.")
  fields = _Fields(values, served.limits)
  fields.check_model(served.names)
  fields.choice("size", ("auto", served.size), "auto")
  fields.choice("quality", QUALITIES, "auto")
  fields.choice("background", ("auto", "opaque"), "auto")
  fields.refuse()
  label, decoder = fields.decoder(served)
  stream = fields.flag("stream")
  partial_images = fields.whole("partial_images", 0, MOST_PARTIALS, 0)
  if partial_images and not stream:
    raise _wrong("partial_images", "stream=true beside it",
                 f"partial_images={partial_images} alone")
  identity = values.get("safety_identifier") or values.get("user")
  return ImageRequest(
      fields.prompt(), decoder, label,
      fields.whole("n", 1, served.limits.images, 1),
      fields.whole("seed", 0, SEEDS - 1, None), fields.sampling(),
      fields.choice("output_format", tuple(FORMATS), "png"),
      max(fields.whole("output_compression", 0, 100, 90), 1),
      fields.choice("response_format", ("b64_json", "url"), "b64_json")
      == "url",
      stream, partial_images, fields.flag("progress"),
      f"{client} {identity[:200]}" if isinstance(identity, str) else client)


def _wrong(name: str, expected: str, got: str) -> ApiError:
  return ApiError(400, f"Expected {expected}, got {got}.", param=name)


class _Fields:
  """The fields of a request; each method checks one kind."""

  def __init__(self, values: Mapping[str, Any], limits: Limits):
    self._values, self._limits = values, limits

  def _show(self, name: str) -> str:
    return f"{name}={self._values[name]!r}"[:60]

  def choice(self, name: str, known: tuple[str, ...], default: str) -> str:
    value = self._values.get(name)
    if value is None:
      return default
    if not isinstance(value, str) or value not in known:
      raise _wrong(
          name, f"{name} to be one of {', '.join(known)}", self._show(name))
    return value

  def flag(self, name: str) -> bool:
    value = self._values.get(name)
    if value is not None and not isinstance(value, bool):
      raise _wrong(name, f"{name} to be true or false", self._show(name))
    return bool(value)

  def whole(self, name: str, low: int, high: int, default: int | None) -> int:
    """Returns a whole number; without a default, a random one."""
    value = self._values.get(name)
    if value is None:
      return secrets.randbelow(high) if default is None else default
    if isinstance(value, float) and value.is_integer():  # such as 1.0
      value = int(value)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not low <= value <= high:
      raise _wrong(name, f"{name} to be a whole number in [{low}, {high}]",
                   self._show(name))
    return value

  def prompt(self) -> str:
    value = self._values.get("prompt")
    if not isinstance(value, str):
      raise _wrong("prompt", "a prompt, a text of a few words",
                   "none" if value is None else self._show("prompt"))
    try:
      return clean(value, self._limits.prompt)
    except UserError as error:
      raise ApiError(400, str(error), param="prompt") from error

  def check_model(self, names: tuple[str, ...]) -> None:
    value = self._values.get("model")
    if value is not None and value not in names:
      raise ApiError(
          404, f"Expected the model {names[0]}, got {self._show('model')}. "
          "GET /v1/models lists what is served.", param="model",
          code="model_not_found")

  def decoder(self, served: Served) -> tuple[str, Decoder]:
    value = self._values.get("decoder")
    if value is None:
      value = next(iter(served.decoders))
    if isinstance(value, str) and value in served.decoders:
      return value, served.decoders[value]
    if served.parse is None or not isinstance(value, str):
      raise _wrong("decoder", "a decoder that is served here, one of "
                   f"{', '.join(served.decoders)}", self._show("decoder"))
    try:
      return value, served.parse(value)
    except UserError as error:
      raise ApiError(400, str(error), param="decoder") from error

  def sampling(self) -> Overrides:
    """Numbers, in the ranges of the pipeline."""
    found: dict[str, Any] = {}
    for name, setting in _SAMPLING.items():
      value = self._values.get(name)
      if value is None:
        continue
      try:
        arguments.check_sampling({**_NO_SAMPLING, setting: value})
      except UserError as error:
        message = str(error).replace(setting, name)
        raise ApiError(400, message, param=name) from error
      found[setting] = value
    return cast(Overrides, found)

  def refuse(self) -> None:
    """Refuses unsupported fields that would change the image."""
    for name in REFUSED:
      if self._values.get(name) is not None:
        raise _wrong(name, f"no {name}, which this model does not have",
                     self._show(name))
