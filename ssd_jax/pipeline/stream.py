"""Continuous batching: images one by one as they finish, of any prompts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.outputs import Picture
from ssd_jax.core.protocols import Family
from ssd_jax.core.types import Prompt
from ssd_jax.decoding import continuous_batching, engine
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.pipeline.run import Run
from ssd_jax.runtime import sharding

_PASSES = 16  # between two reports of progress

# A finished image that still lacks its pixels, and those pixels on the device.
_Finished = tuple[Callable[..., Picture], jax.Array]


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

  def __init__(self, run: Run, family: Family, request: StreamRequest):
    self._run, self._family, self._request = run, family, request
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
    finished: list[_Finished] = []
    batch = _Batch(self._run, self._request)
    while True:
      for slot in batch.free_slots():
        item = next(waiting, None)
        if item is None:
          break
        batch.insert(slot, *item)
      is_busy = batch.start()  # the device goes on while images are handed over
      for finish, image in finished:
        yield finish(image=sharding.fetch(image)[0])
      if not is_busy:
        return
      reported = batch.images_done
      finished = batch.finish()
      self.passes = batch.passes
      if self._request.on_step:
        self._request.on_step(batch.images_done - reported)

  def _waiting(self) -> Iterator[tuple[int, str, Prompt]]:
    """Yields (index, text, prompt) of each image."""
    request = self._request
    first = request.first_image
    indices = (itertools.count(first) if isinstance(first, (int, np.integer))
               else iter(first))
    for text in request.prompts:
      prompt, new_notes = self._family.encode_prompts([text], request.guided)
      self.notes += [note for note in new_notes if note not in self.notes]
      for _ in range(request.num_images):
        yield int(next(indices)), text, prompt


class _Batch:
  """The slots of a batch and the image in each.

  Attributes:
    passes: Forward passes of all slots together.
    images_done: Images so far, unfinished ones in part.
  """

  def __init__(self, run: Run, request: StreamRequest):
    self._run, self._request = run, request
    self._key = jax.random.key(request.seed)
    self._images: list[tuple[int, str] | None] = [None] * request.batch
    self._passes_B = np.zeros(request.batch, np.int64)
    self._loop: engine.LoopState | None = None
    self._found: list[Any] = []
    self.passes, self.images_done, self._ended = 0, 0.0, 0

  def free_slots(self) -> list[int]:
    """Returns the slots without an image."""
    return [slot for slot, x in enumerate(self._images) if x is None]

  def insert(self, slot: int, index: int, text: str, prompt: Prompt) -> None:
    """Prefills a prompt into a free slot."""
    request, loop = self._request, self._loop
    prompt = self._run.pad(prompt)
    if loop is None:
      rows = jax.tree.map(
          lambda x: jnp.repeat(x, request.batch, axis=0), prompt)
      self._run.choose_devices(rows, request.sampling, request.batch)
      loop = self._run(
          continuous_batching.init, self._run.place(prompt), request.sampling,
          batch=request.batch)
    # All images get as many prompt slots as the longest prompt so far.
    loop = continuous_batching.widen_batch(loop, prompt.tokens.shape[1])
    prompt = continuous_batching.widen(prompt, loop.prompt.tokens.shape[1])
    self._loop = self._run(
        continuous_batching.insert, self._run.place(prompt), request.sampling,
        self._key, loop, np.int32(index), np.int32(slot))
    self._images[slot], self._passes_B[slot] = (index, text), 1

  def start(self) -> bool:
    """Starts some passes; returns False if no slot holds an image."""
    if not any(self._images):
      return False
    self._loop, *self._found = self._run(
        continuous_batching.advance, self._request.sampling, self._key,
        self._loop, np.int32(_PASSES))
    return True

  def finish(self) -> list[_Finished]:
    """Frees the slots of finished images and returns these."""
    decoded, is_done_B = sharding.fetch(self._found)
    self.passes += int(max(decoded.passes - self._passes_B))
    self._passes_B = np.asarray(decoded.passes, np.int64)
    taken = [slot for slot, x in enumerate(self._images) if x is not None]
    is_final = decoded.commit_pass[taken] > 0
    self.images_done = self._ended + float(is_final.mean((1, 2)).sum())
    found: list[_Finished] = []
    for slot, image in enumerate(self._images):
      if image is not None and is_done_B[slot]:
        tokens = decoded.tokens[slot]
        picture = functools.partial(
            Picture, *image, tokens=tokens, passes=int(decoded.passes[slot]),
            commit_pass=decoded.commit_pass[slot])
        found.append((picture, self._run.decode_images(tokens[None])))
        self._images[slot] = None
    self._ended += len(found)
    return found
