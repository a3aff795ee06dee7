"""Lanes: the batches of one decoder and one kind of settings."""

from collections.abc import Callable, Iterator
import dataclasses
import time
from typing import NamedTuple

import numpy as np

from ssd_jax.core.protocols import Decoder
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.pipeline.run import Run
from ssd_jax.pipeline.slots import Finished, Item, Slots
from ssd_jax.serving.tickets import Drawing

_TURN = 0.15  # seconds of passes after which others are looked at
_MOST_PASSES = 16


class LaneKey(NamedTuple):
  """What images of a batch must have in common.

  Attributes:
    decoder: Settings of the decoder.
    guided: Whether two guidance streams run.
    filtered: Whether top-k and top-p are applied, with numbers of each image.
    rows: Rows that are given.
  """

  decoder: Decoder
  guided: bool
  filtered: bool
  rows: int = 0


def lane_key(drawing: Drawing) -> LaneKey:
  """Returns what an image needs of its lane."""
  item = drawing.item
  rows = 0 if item.given is None else len(item.given)
  return LaneKey(drawing.ticket.request.decoder, len(item.prompt.tokens) > 1,
                 item.sampling.use_top_k, rows)


@dataclasses.dataclass(frozen=True)
class Turn:
  """What a lane did between two looks at the queue.

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

  def __init__(self, pipe: Pipeline, key: LaneKey, sizes: tuple[int, ...]):
    self.key = key
    self.used = time.monotonic()
    self._pipe, self._sizes = pipe, sizes
    self._pass_seconds = 0.0
    self._batches: list[Slots] = []
    self.reset()

  def reset(self) -> None:
    """Forgets all images; programs are kept."""
    programs = self._pipe.programs.completing(self.key.rows)
    self._batches = [
        Slots(Run(programs, self.key.decoder), size) for size in self._sizes]

  def warm(self, item: Item) -> None:
    """Compiles what the lane runs, by beginning an image in each size."""
    for slots in self._batches:
      slots.insert(0, item)
      slots.start(1)
      if not slots.finish():
        slots.evict(0)
    grid = self._pipe.model.grid
    self._pipe.decode_images(np.zeros((1, grid.rows, grid.cols), np.int32))
    self.reset()

  def drawings(self) -> Iterator[tuple[Slots, int, Drawing]]:
    """Iterates over (batch, slot, image) of the images in slots."""
    for slots in self._batches:
      for slot, item in slots.items():
        yield slots, slot, item.name

  def fill(self, take: Callable[[], Drawing | None], waiting: int) -> None:
    """Puts waiting images into free slots.

    A single image gets the small batch, unless the large one runs anyway.

    Args:
      take: Returns the next waiting image, or None.
      waiting: How many wait.
    """
    small, large = self._batches[0], self._batches[-1]
    is_alone = waiting == 1 and small.free() and not large.items()
    slots = small if is_alone else large
    for slot in slots.free():
      drawing = take()
      if drawing is None:
        return
      slots.insert(slot, drawing.item)
      drawing.started = time.monotonic()

  def turn(self) -> Iterator[Turn]:
    """Runs a few passes of each batch that holds an image."""
    most = 1  # to measure how long it takes
    if self._pass_seconds:
      most = int(np.clip(_TURN / self._pass_seconds, 1, _MOST_PASSES))
    for slots in self._batches:
      busy, passes, start = len(slots.items()), slots.passes, time.monotonic()
      if not slots.start(most):
        continue
      finished = slots.finish()
      self.used = time.monotonic()
      seconds, passes = self.used - start, slots.passes - passes
      self._pass_seconds = seconds / max(passes, 1)
      yield Turn(finished, slots.in_progress(), passes,
                 seconds, busy, slots.batch)
