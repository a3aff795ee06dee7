"""Continuous batching: images one by one as they finish, of any prompts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import itertools

import numpy as np

from ssd_jax.core.outputs import Picture
from ssd_jax.core.protocols import EncodePrompts
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.pipeline.run import Run
from ssd_jax.pipeline.slots import Finished, Item, Slots
from ssd_jax.runtime import sharding

_PASSES = 16  # between two reports of progress


@dataclasses.dataclass(frozen=True)
class StreamRequest:
  """What to generate, and how.

  Attributes:
    prompts: Texts; read as slots become free.
    num_images: Images per prompt.
    seed: Seed of the noise.
    batch: Images decoded together.
    first_image: Index of the first image, or of each.
    sampling: Settings of the target distribution.
    guided: Whether two guidance streams run.
    on_step: Called every few passes with the images finished since the last
      call, in fractions.
  """

  prompts: Iterable[str]
  num_images: int
  seed: int
  batch: int
  first_image: int | Sequence[int]
  sampling: Sampling
  guided: bool
  on_step: Callable[[float], None] | None = None


class Stream:
  """Iterates over images in the order in which they finish.

  The device decodes the next images while the caller handles the last one. At
  most two batches of images are in memory.

  Attributes:
    notes: What the user should know about the prompts read so far.
    clock: Time spent compiling, and the rest.
    passes: Forward passes of the whole batch so far, prefills not counted.
  """

  def __init__(
      self, run: Run, encode: EncodePrompts, request: StreamRequest
  ):
    self._run, self._encode_prompts, self._request = run, encode, request
    self.notes: list[str] = []
    self.clock = run.clock
    self.passes = 0
    self._pictures = self._generate()

  def __iter__(self) -> Iterator[Picture]:
    return self

  def __next__(self) -> Picture:
    return next(self._pictures)

  def _generate(self) -> Iterator[Picture]:
    waiting = self._waiting()
    finished: list[Finished] = []
    batch = Slots(self._run, self._request.batch)
    while True:
      for slot in batch.free():
        item = next(waiting, None)
        if item is None:
          break
        batch.insert(slot, item)
      # The device goes on while images are handed over.
      is_busy = batch.start(_PASSES)
      for x in finished:
        index, text = x.name
        yield Picture(index, text, sharding.fetch(x.pixels)[0], x.tokens,
                      x.passes, x.commit_pass)
      if not is_busy:
        return
      reported = batch.images_done
      finished = batch.finish()
      self.passes = batch.passes
      if self._request.on_step:
        self._request.on_step(batch.images_done - reported)

  def _waiting(self) -> Iterator[Item]:
    """Yields each image, by the name (index, text)."""
    request = self._request
    first = request.first_image
    indices = (itertools.count(first) if isinstance(first, (int, np.integer))
               else iter(first))
    for text in request.prompts:
      prompt, new_notes = self._encode_prompts([text], request.guided)
      self.notes += [note for note in new_notes if note not in self.notes]
      for _ in range(request.num_images):
        index = int(next(indices))
        yield Item(
            (index, text), index, request.seed, prompt, request.sampling)
