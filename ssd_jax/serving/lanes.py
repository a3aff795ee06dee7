"""Lanes: the batches of one decoder and one kind of settings."""

from collections.abc import Callable, Iterator
import dataclasses
import time

import numpy as np

from ssd_jax.pipeline.slots import Finished
from ssd_jax.serving.batches import Batches, LaneKey
from ssd_jax.serving.tickets import Drawing

_TURN = 0.15  # seconds of passes after which others are looked at
_MOST_PASSES = 16


def lane_key(drawing: Drawing) -> LaneKey:
  """Returns the key of the lane that can decode an image."""
  item = drawing.item
  rows = 0 if item.given is None else len(item.given)
  return LaneKey(drawing.ticket.request.decoder, len(item.prompt.tokens) > 1,
                 item.sampling.use_top_k, rows)


@dataclasses.dataclass(frozen=True)
class Turn:
  """Results of a lane's passes between two checks of the queue.

  Attributes:
    finished: Images that are final.
    drawings: (image, tokens, commit_pass) of those in progress.
    passes: Passes that ran.
    seconds: Seconds that they took.
    busy: Slots that held an image.
    slots: Slots of the batch.
  """

  finished: list[Finished]
  drawings: list[tuple[Drawing, np.ndarray, np.ndarray]]
  passes: int
  seconds: float
  busy: int
  slots: int


class Lane:
  """Decodes images of one kind: one alone, or as many as come.

  Attributes:
    key: What the images have in common.
    used: Time at which it last decoded.
  """

  def __init__(self, batches: Batches, key: LaneKey):
    self.key = key
    self.used = time.monotonic()
    self._batches = batches
    self._pass_seconds = 0.0

  def drawings(self) -> Iterator[Drawing]:
    """Iterates over the images in slots."""
    for slots in self._batches.of(self.key):
      for _, item in slots.items():
        yield item.name

  def evict(self, is_unwanted: Callable[[Drawing], bool]) -> None:
    """Frees the slots of images that are not wanted any more."""
    for number, slots in enumerate(self._batches.of(self.key)):
      for slot, item in slots.items():
        if is_unwanted(item.name):
          self._batches.evict(self.key, number, slot)

  def clear(self) -> None:
    """Forgets all images."""
    self._batches.clear(self.key)

  def fill(self, take: Callable[[], Drawing | None], waiting: int) -> None:
    """Puts waiting images into free slots.

    A single image gets the small batch, unless the large one runs anyway.

    Args:
      take: Returns the next waiting image, or None.
      waiting: How many wait.
    """
    batches = self._batches.of(self.key)
    is_alone = (
        waiting == 1 and batches[0].free() and not batches[-1].items())
    number = 0 if is_alone else len(batches) - 1
    for slot in batches[number].free():
      drawing = take()
      if drawing is None:
        return
      self._batches.insert(self.key, number, slot, drawing.item)
      drawing.started = time.monotonic()

  def turn(self) -> Iterator[Turn]:
    """Runs a few passes of each batch that holds an image."""
    most = 1  # to measure how long it takes
    if self._pass_seconds:
      most = int(np.clip(_TURN / self._pass_seconds, 1, _MOST_PASSES))
    for number, slots in enumerate(self._batches.of(self.key)):
      busy, passes, start = len(slots.items()), slots.passes, time.monotonic()
      if not busy:
        continue
      finished = self._batches.advance(self.key, number, most)
      self.used = time.monotonic()
      seconds, passes = self.used - start, slots.passes - passes
      self._pass_seconds = seconds / max(passes, 1)
      yield Turn(finished, slots.in_progress(), passes,
                 seconds, busy, slots.batch)
