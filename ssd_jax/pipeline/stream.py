"""Pictures one by one as they finish, of any number of prompts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.outputs import Picture
from ssd_jax.core.types import Prompt
from ssd_jax.decoding import continuous_batching, engine
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Clock

_PASSES = 16  # after which whoever waits is told how far it is


@dataclasses.dataclass(frozen=True)
class StreamRequest:
  """What is to be drawn, and how.

  Attributes:
    prompts: Texts; read as there is room for them.
    decoder: Settings.
    num_images: Pictures of each prompt.
    seed: Of the noise.
    batch: Pictures drawn together.
    first_image: Index of the first picture, or of each.
    sampling: Of the target distribution.
    guided: Whether two streams are run.
  """

  prompts: Iterable[str]
  decoder: engine.Decoder
  num_images: int
  seed: int
  batch: int
  first_image: int | Sequence[int]
  sampling: Sampling
  guided: bool
  on_step: Callable[[float], None] | None = None


class Stream:
  """Iterates over pictures in the order in which they finish.

  While the next ones are drawn, whoever iterates has time for the last. At no
  time are there more than two batches of pictures in memory.

  Attributes:
    notes: What the user should know about the prompts read so far.
    clock: Of the time spent compiling, and of the rest.
    passes: Trunk forwards of the whole batch so far, beside one per prompt.
  """

  def __init__(self, pipe: Any, order: StreamRequest):
    self._pipe, self._order = pipe, order
    self.notes: list[str] = []
    self.clock = Clock()
    self.passes = 0
    self._pictures = self._draw()

  def __iter__(self) -> Iterator[Picture]:
    return self

  def __next__(self) -> Picture:
    return next(self._pictures)

  def _draw(self) -> Iterator[Picture]:
    waiting = self._waiting()
    finished: list[tuple[Callable[..., Picture], jax.Array]] = []
    batch = _Batch(self._pipe, self._order, self.clock)
    while True:
      for place in batch.free():
        item = next(waiting, None)
        if item is None:
          break
        batch.insert(place, *item)
      is_busy = batch.start()  # draws on while the last ones are handed over
      for finish, image in finished:
        yield finish(image=sharding.fetch(image)[0])
      if not is_busy:
        return
      told = batch.drawn
      finished = batch.finish()
      self.passes = batch.passes
      if self._order.on_step:
        self._order.on_step(batch.drawn - told)

  def _waiting(self) -> Iterator[tuple[int, str, Prompt]]:
    """(index, text, prompt) of each picture."""
    order = self._order
    first = order.first_image
    indices = (itertools.count(first) if isinstance(first, (int, np.integer))
               else iter(first))
    for text in order.prompts:
      prompt, said = self._pipe.family.encode_prompts([text], order.guided)
      self.notes += [note for note in said if note not in self.notes]
      for _ in range(order.num_images):
        yield int(next(indices)), text, prompt


class _Batch:
  """The places of a batch and who is drawn in each.

  Attributes:
    passes: Trunk forwards of all places together.
    drawn: Pictures so far, those of which only a part is final in part.
  """

  def __init__(self, pipe: Any, order: StreamRequest, clock: Clock):
    self._pipe, self._order, self._clock = pipe, order, clock
    self._mesh: jax.sharding.Mesh | None = None
    self._key = jax.random.key(order.seed)
    self._who: list[tuple[int, str] | None] = [None] * order.batch
    self._passes_B = np.zeros(order.batch, np.int64)
    self._loop: engine.LoopState | None = None
    self._found: list[Any] = []
    self.passes, self.drawn, self._ended = 0, 0.0, 0

  def free(self) -> list[int]:
    """Places that nobody has."""
    return [place for place, who in enumerate(self._who) if who is None]

  def insert(self, place: int, index: int, text: str, prompt: Prompt) -> None:
    """Prefills a prompt into a place."""
    order, loop = self._order, self._loop
    if loop is None:
      rows = jax.tree.map(lambda x: jnp.repeat(x, order.batch, axis=0), prompt)
      self._mesh = self._clock.compile(
          self._pipe.cores, order.decoder, rows, order.sampling, order.batch)
    with sharding.use_mesh(self._mesh):
      prompt = sharding.shard_rows(prompt)
      if loop is None:
        loop = self._run(
          continuous_batching.init, prompt, order.sampling, batch=order.batch
        )
      # The longest prompt so far says how many slots all have.
      loop = continuous_batching.widen_batch(loop, prompt.tokens.shape[1])
      prompt = continuous_batching.widen(prompt, loop.prompt.tokens.shape[1])
      self._loop = self._run(
          continuous_batching.insert, prompt, order.sampling, self._key, loop,
          np.int32(index), np.int32(place))
    self._who[place], self._passes_B[place] = (index, text), 1

  def start(self) -> bool:
    """Lets the device draw for a while; whether there is somebody to draw."""
    if not any(self._who):
      return False
    with sharding.use_mesh(self._mesh):
      self._loop, *self._found = self._run(
        continuous_batching.advance,
        self._order.sampling,
        self._key,
        self._loop,
        np.int32(_PASSES),
      )
    return True

  def finish(self) -> list[tuple[Callable[..., Picture], jax.Array]]:
    """(picture but for its `image`, image [1, H, W, 3]) of who is done."""
    decoded, is_done_B = sharding.fetch(self._found)
    self.passes += int(max(decoded.passes - self._passes_B))
    self._passes_B = np.asarray(decoded.passes, np.int64)
    taken = [place for place, who in enumerate(self._who) if who is not None]
    is_final = decoded.commit_pass[taken] > 0
    self.drawn = self._ended + float(is_final.mean((1, 2)).sum())
    found: list[tuple[Callable[..., Picture], jax.Array]] = []
    for place, who in enumerate(self._who):
      if who is not None and is_done_B[place]:
        tokens = decoded.tokens[place]
        picture = functools.partial(
            Picture, *who, tokens=tokens, passes=int(decoded.passes[place]),
            commit_pass=decoded.commit_pass[place])
        found.append((picture, self._paint(jnp.asarray(tokens[None]))))
        self._who[place] = None
    self._ended += len(found)
    return found

  def _paint(self, tokens: jax.Array) -> jax.Array:
    paint = self._clock.compile(self._pipe.compiled_images, tokens)
    return paint(self._pipe.vq_params, tokens)

  def _run(self, function, *args, **static):
    args = (self._pipe.params_for(self._order.decoder, self._mesh), *args)
    run = self._clock.compile(
        self._pipe.compiled, function, self._order.decoder, *args, **static)
    return run(*args)
