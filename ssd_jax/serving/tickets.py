"""Accepted requests (tickets), their images and their events."""

from collections.abc import Callable
import dataclasses
import io
import threading
import time

import numpy as np
from PIL import Image

from ssd_jax.core.types import Prompt
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.pipeline.slots import Item
from ssd_jax.serving.requests import ApiError, ImageRequest


@dataclasses.dataclass(frozen=True)
class _OfImage:
  """What is known of an image so far.

  Attributes:
    image: Number of the image within its request.
    commit_pass: int32 [R, C], pass in which each token became final, else 0.
  """

  image: int
  commit_pass: np.ndarray


@dataclasses.dataclass(frozen=True)
class Progress(_OfImage):
  """Commits of an unfinished image."""


@dataclasses.dataclass(frozen=True)
class Partial(_OfImage):
  """An unfinished image.

  Attributes:
    index: Number of this event among those of the image.
    file: The image, encoded.
  """

  index: int
  file: bytes


@dataclasses.dataclass(frozen=True)
class Completed(_OfImage):
  """A finished image, all of whose tokens are committed.

  Attributes:
    file: The image, encoded.
    passes: Forward passes, the prefill among them.
    seconds: Time from the prefill to the last pass, in its company.
  """

  file: bytes
  passes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class Failed:
  """The end of a request that did not complete."""

  error: ApiError


Event = Progress | Partial | Completed | Failed


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request that was accepted.

  Attributes:
    request: The request.
    prompt: Its encoded prompt.
    sampling: Settings of the target distribution.
    notes: What the client should know about the prompt.
    given: int32 [rows, C], rows of tokens that the images begin with, or None.
    listen: Called with each event, by threads of the server.
    deadline: Time at which it is given up.
    arrived: Time at which it came.
    drawn: Images that are complete.
  """

  request: ImageRequest
  prompt: Prompt
  sampling: Sampling
  notes: tuple[str, ...]
  given: np.ndarray | None
  listen: Callable[[Event], None]
  deadline: float
  arrived: float = dataclasses.field(default_factory=time.monotonic)
  drawn: int = 0
  _reason: str | None = None
  _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  @property
  def reason(self) -> str | None:
    """Why it has ended: done, cancelled, deadline, error; None before."""
    return self._reason

  def end(self, reason: str, error: ApiError | None = None) -> bool:
    """Ends the request; returns False if it has ended already.

    Args:
      reason: See `reason`.
      error: The error sent to the client.
    """
    with self._lock:
      if self._reason is not None:
        return False
      self._reason = reason
    if error:
      self.listen(Failed(error))
    return True

  def complete(self, event: Completed) -> bool:
    """Hands a finished image over; returns whether it was the last."""
    if self._reason is None:
      self.listen(event)
    self.drawn += 1
    return self.drawn == self.request.images and self.end("done")


@dataclasses.dataclass(eq=False)
class Drawing:
  """An image of a request, waiting or in a slot.

  Attributes:
    ticket: The request.
    number: Number of the image within the request.
    item: The image to decode.
    started: Time of its prefill.
    partials: Unfinished images sent or in the making.
  """

  ticket: Ticket
  number: int
  item: Item = dataclasses.field(init=False)
  started: float = 0.0
  partials: int = 0

  def is_due(self, share: float) -> bool:
    """Returns whether an unfinished image should be sent now.

    They are spread evenly over the image's tokens.

    Args:
      share: Share of its tokens that are final.
    """
    asked = self.ticket.request.partial_images
    return self.partials < asked and (
        share >= (self.partials + 1) / (asked + 1))


def encode_file(image: np.ndarray, request: ImageRequest) -> bytes:
  """Encodes an image, uint8 [H, W, 3], as the request asks."""
  file = io.BytesIO()
  options = ({"compress_level": 3} if request.output_format == "png"
             else {"quality": request.quality})
  Image.fromarray(image).save(file, request.output_format, **options)
  return file.getvalue()
