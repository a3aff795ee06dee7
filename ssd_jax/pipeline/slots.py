"""Slots of a continuous batch, for streams and the server."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.types import Prompt
from ssd_jax.decoding import continuous_batching, engine
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.pipeline import completion
from ssd_jax.pipeline.run import Run
from ssd_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Item:
  """An image to decode.

  Attributes:
    name: What the caller knows it by.
    index: Its index, which with the seed keys its noise.
    seed: Seed of the noise.
    prompt: The prompt of one image.
    sampling: Settings of the target distribution; all images of a batch have
      the same filters.
    given: int32 [rows, C], first rows of the image, or None; see `completion`.
      All images of a batch have as many.
  """

  name: Any
  index: int
  seed: int
  prompt: Prompt
  sampling: Sampling
  given: np.ndarray | None = None

  def __getstate__(self) -> dict[str, Any]:
    """Returns what other hosts need; a name stays with its caller."""
    return {**self.__dict__, "name": None}


@dataclasses.dataclass(frozen=True)
class Finished:
  """A finished image.

  Attributes:
    name: The name of its item.
    tokens: int32 [R, C].
    passes: Forward passes, the prefill among them.
    commit_pass: int32 [R, C], pass in which each token became final.
    pixels: uint8 [1, H, W, 3] on the device, maybe still in the making; None
      if the batch decodes no images.
  """

  name: Any
  tokens: np.ndarray
  passes: int
  commit_pass: np.ndarray
  pixels: jax.Array | None


class Slots:
  """The slots of a batch and the image in each.

  Args:
    run: Programs of one decoder.
    batch: Number of slots.
    decodes_images: Whether finished images come with their pixels.

  Attributes:
    passes: Forward passes of all slots together, prefills not counted.
    images_done: Images so far, unfinished ones in part.
  """

  def __init__(self, run: Run, batch: int, decodes_images: bool = True):
    self._run, self._decodes_images = run, decodes_images
    self._items: list[Item | None] = [None] * batch
    self._passes_B = np.zeros(batch, np.int64)
    self._loop: engine.LoopState | None = None
    self._running: list[Any] = []
    self._decoded: Any = None
    self.passes, self.images_done, self._ended = 0, 0.0, 0

  @property
  def batch(self) -> int:
    """The number of slots."""
    return len(self._items)

  def items(self) -> list[tuple[int, Item]]:
    """Returns (slot, image) of the slots that hold one."""
    return [(slot, x) for slot, x in enumerate(self._items) if x is not None]

  def free(self) -> list[int]:
    """Returns the slots without an image."""
    return [slot for slot, x in enumerate(self._items) if x is None]

  def insert(self, slot: int, item: Item) -> None:
    """Prefills the prompt of an image into a free slot."""
    given = None if item.given is None else item.given[None]
    prompt, loop = self._run.prepare(item.prompt, given), self._loop
    if loop is None:
      batch = len(self._items)
      rows = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), prompt)
      self._run.choose_devices(rows, item.sampling, batch)
      loop = self._run(
          continuous_batching.init, self._run.place(prompt), item.sampling,
          batch=batch)
    # All images get as many prompt slots as the longest prompt so far.
    loop = continuous_batching.widen_batch(loop, prompt.tokens.shape[1])
    prompt = continuous_batching.widen(prompt, loop.prompt.tokens.shape[1])
    self._loop = self._run(
        continuous_batching.insert, self._run.place(prompt), item.sampling,
        jax.random.key(item.seed), loop, np.int32(item.index), np.int32(slot))
    self._items[slot], self._passes_B[slot] = item, 1

  def evict(self, slot: int) -> None:
    """Frees the slot of an image that is not wanted any more.

    Raises:
      ValueError: if passes are running, or the slot is free.
    """
    if self._running or self._items[slot] is None:
      raise ValueError("Expected no running pass and an image in slot "
                       f"{slot}, got a busy batch or a free slot.")
    self._loop = self._run(
        continuous_batching.evict, self._loop, np.int32(slot))
    self._items[slot] = None

  def start(self, max_passes: int) -> bool:
    """Starts passes until an image finishes; False if no slot holds one.

    Args:
      max_passes: Largest number of passes.
    """
    if not any(self._items):
      return False
    self._loop, *self._running = self._run(
        continuous_batching.advance, self._loop, np.int32(max_passes))
    return True

  def finish(self) -> list[Finished]:
    """Waits for the passes, and frees the slots of the images they finished."""
    decoded, is_done_B = sharding.fetch(self._running)
    decoded = completion.join(self._given(), decoded)
    self._running, self._decoded = [], decoded
    self.passes += int(max(decoded.passes - self._passes_B))
    self._passes_B = np.asarray(decoded.passes, np.int64)
    is_final = [decoded.commit_pass[slot] > 0 for slot, _ in self.items()]
    self.images_done = self._ended + float(np.mean(is_final, (1, 2)).sum())
    found = []
    for slot, item in self.items():
      if is_done_B[slot]:
        tokens = decoded.tokens[slot]
        pixels = (self._run.decode_images(tokens[None])
                  if self._decodes_images else None)
        found.append(Finished(
            item.name, tokens, int(decoded.passes[slot]),
            decoded.commit_pass[slot], pixels))
        self._items[slot] = None
    self._ended += len(found)
    return found

  def _given(self) -> np.ndarray | None:
    """Returns the rows that were given, int32 [B, rows, C], or None."""
    given = {slot: item.given for slot, item in self.items()
             if item.given is not None}
    if not given:
      return None
    nothing = np.zeros_like(next(iter(given.values())))
    return np.stack([given.get(slot, nothing) for slot in range(self.batch)])

  def in_progress(self) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """Returns (name, tokens, commit_pass) of each unfinished image.

    They are those of the last `finish`, int32 [R, C]; an image that was
    inserted since then has none yet, and is left out.
    """
    if self._decoded is None:
      return []
    found = self._decoded
    return [
        (item.name, found.tokens[slot], found.commit_pass[slot])
        for slot, item in self.items()
        if self._passes_B[slot] == found.passes[slot]]
