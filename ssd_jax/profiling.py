"""Where the time of a pass goes, beside what the machine could do at best.

The parts of a pass are the engine's own functions, each compiled by itself and
timed on the arrays of a pass in the middle of an image; the whole pass is that
of the real loop. What it has beyond its parts is the loop's own. The roofline's
bandwidth and arithmetic are measured in the same run.
"""

from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from ssd_jax import sampling as sampling_lib
from ssd_jax.decoding import acceptance, engine
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.jacobi import SJD
from ssd_jax.models import attention
from ssd_jax.pipeline import Pipeline
from ssd_jax.roofline import Machine, seconds_of
from ssd_jax.sampling import Overrides
from ssd_jax.types import KVCache, Queries

QUERIES = (1, 2, 4, 8, 16, 32, 64)
PARTS = ("trunk", "head", "sampling", "acceptance", "drafting")


@dataclasses.dataclass(frozen=True)
class Row:
  """A pass of so many queries; seconds.

  Attributes:
    queries: Q.
    parts: By the names of PARTS; attention is within the trunk. None for what
      the model has not.
    attention: All layers' products with the cache.
    whole: A pass of the loop.
    bytes: That must move: weights, keys and values once.
    flops: Of it.
    least: Seconds by the roofline.
  """

  queries: int
  parts: dict[str, float | None]
  attention: float
  whole: float
  bytes: float
  flops: float
  least: float

  @property
  def rest(self) -> float:
    """Of the loop, beyond the parts that a pass of SJD has."""
    return self.whole - sum(
        self.parts[k] or 0.0 for k in PARTS if k != "drafting")


@dataclasses.dataclass(frozen=True)
class Host:
  """An image of the last row's decoder from text to pixels; seconds.

  Attributes:
    prompt: Words to ids.
    drawing: The loop.
    pixels: Codes to pixels.
    rest: All else: Python, calls and copies.
    passes: Of it.
  """

  prompt: float
  drawing: float
  pixels: float
  rest: float
  passes: int


def _timed(function: Callable, args: tuple, machine: Machine) -> float:
  """Seconds of a compiled function, less what the call itself takes."""
  run = jax.jit(function)
  return max(seconds_of(lambda: run(*args)) - machine.dispatch, 0.0)


class Profiler:
  """A model's passes.

  Attributes:
    pipe: The model.
    batch: Images drawn together.
  """

  def __init__(
      self, pipe: Pipeline, text: str, batch: int,
      **sampling: Unpack[Overrides],
  ):
    self.pipe, self.batch = pipe, batch
    self._text, self._choices = text, sampling
    self._settings, guided = pipe.sampling(**sampling)
    self._prompt, _ = pipe.family.encode_prompts([text] * batch, guided)
    self._streams = 1 + guided
    self._params = pipe.params_for(AR())
    self._cache = jax.jit(lambda: pipe.model.prefill(
        self._params, self._prompt, 0)[1])()
    self._programs: dict[int, Any] = {}

  @functools.cached_property
  def counts(self) -> tuple[int, int]:
    """(bytes of weights, keys and values; weights that multiply queries)."""
    trunk = {k: v for k, v in self._params["trunk"].items()
             if k != "embedding" and not k.startswith("caption")}
    leaves = jax.tree.leaves(trunk)
    moved = sum(x.nbytes for x in leaves + jax.tree.leaves(self._cache))
    return moved, sum(x.size for x in leaves)

  def row(self, queries: int, machine: Machine) -> Row:
    """A pass of so many queries."""
    parts = {name: self._seconds(name, queries, machine) for name in PARTS}
    moved, weights = self.counts
    fed, cfg = self._rows * queries, self.pipe.family.generator.cfg
    attended = fed * cfg.n_layers * self._cache.shape[3]
    flops = 2.0 * fed * weights + 4.0 * attended * cfg.n_heads * cfg.head_dim
    attention = _timed(*self._attention(queries), machine)
    return Row(
        queries, parts, attention,
        self._whole(queries), moved, flops,
        max(moved / machine.bandwidth, flops / machine.flops))

  @property
  def _rows(self) -> int:
    return self._streams * self.batch

  @property
  def _dtype(self) -> jnp.dtype:
    return self.pipe.family.generator.dtype

  def _seconds(
      self, name: str, queries: int, machine: Machine
  ) -> float | None:
    """Of a part, less what the call itself takes."""
    if name == "trunk":
      return max(self._trunk(queries) - machine.dispatch, 0.0)
    make = dict(
        head=self._head, sampling=self._sampling, acceptance=self._acceptance,
        drafting=self._drafting)[name]
    function, args = make(queries)
    return None if function is None else _timed(function, args, machine)

  def _queries(self, count: int) -> Queries:
    """Slots in the middle of the image."""
    grid = self.pipe.model.grid
    slots = jnp.arange(count) + max(0, (grid.length - count) // 2)
    one = Queries(
        jnp.zeros(count, jnp.int32), jnp.minimum(slots, grid.length - 1),
        slots, jnp.arange(grid.length) <= slots[:, None])
    return jax.tree.map(lambda x: jnp.stack([x] * self._rows), one)

  def _trunk(self, count: int) -> float:
    """Seconds of the forward; the cache is given away as in the loop."""
    forward = jax.jit(self.pipe.model.forward, donate_argnums=1)
    queries, held = self._queries(count), [
        jax.tree.map(jnp.copy, self._cache)]

    def run():
      hidden, held[0] = forward(
          self._params, held[0], self._prompt, queries)
      return hidden

    return seconds_of(run)

  def _attention(self, count: int) -> tuple[Callable, tuple]:
    """Every layer's products with the cache, one after the other."""
    cfg, cache = self.pipe.family.generator.cfg, self._cache
    q = self._normal(self._rows, count, cfg.n_heads, cfg.head_dim)
    visible = jnp.ones((self._rows, count, cache.shape[3]), bool)

    def run(cache: KVCache, q, visible):
      for layer in cache.layers():
        q = attention.attend(q, layer.k[0], layer.v[0], visible)
      return q

    return run, (cache, q.astype(self._dtype), visible)

  def _head(self, count: int):
    hidden = self._normal(
        self._streams, self.batch, count, self._hidden_width)
    hidden = hidden.astype(self._dtype)
    return self.pipe.model.logits, (self._params, hidden)

  @property
  def _hidden_width(self) -> int:
    generator = self.pipe.family.generator
    return generator.cfg.d_model * (1 + len(generator.taps))

  def _sample(self, logits, key, slots):
    """The target of stacked streams' logits, and a draw of each slot."""
    p_BQV = sampling_lib.target(logits, self._settings)

    def draw(p_QV, image):
      noise_QV = sampling_lib.token_noise(key, image, slots, p_QV.shape[-1])
      return sampling_lib.sample(p_QV, noise_QV)

    return p_BQV, jax.vmap(draw)(p_BQV, jnp.arange(self.batch))

  def _sampling(self, count: int):
    logits = self._normal(
        self._streams, self.batch, count, self.pipe.model.vocab)
    return self._sample, (
        logits, jax.random.key(0), jnp.arange(count))

  def _acceptance(self, count: int):
    """The test of each draft and the residual of the rejected ones."""
    shape = (self.batch, count, self.pipe.model.vocab)
    p, q = (jax.nn.softmax(self._normal(*shape, seed=i)) for i in (1, 2))
    tokens = jnp.zeros((self.batch, count), jnp.int32)
    drafts = Drafts(tokens, q, tokens > 0)

    def test(p_QV, drafts, u_Q):
      passed = acceptance.accept_exact(p_QV, drafts, u_Q)
      return acceptance.count_prefix(passed), acceptance.residual(p_QV, drafts)

    return jax.vmap(test), (p, drafts, jnp.full((self.batch, count), 0.5))

  def _drafting(self, count: int):
    """One cell drafted by a spatial head for each query."""
    model = self.pipe.model
    if not any(model.heads):
      return None, ()
    shape = (self._streams, self.batch, count)
    hidden = self._normal(*shape, self._hidden_width)
    tokens = jnp.zeros(shape, jnp.int32)

    def draft(params, hidden, tokens, key, slots):
      logits = model.draft(params, "vertical", 1, hidden, tokens)
      return self._sample(logits, key, slots)

    return draft, (
        self._params, hidden.astype(self._dtype), tokens,
        jax.random.key(0), jnp.arange(count))

  def _normal(self, *shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)

  def _decoded(self, queries: int) -> Callable[[], engine.Decoded]:
    """Draws a batch with a window of so many queries."""
    args = (self._params, self._prompt, self._settings, jax.random.key(0),
            jnp.arange(self.batch))
    if queries not in self._programs:
      self._programs[queries] = engine.decode.lower(
          self.pipe.model, SJD(window=queries), *args).compile()
    return lambda: self._programs[queries](*args)

  def _whole(self, queries: int) -> float:
    """Seconds of a pass of the loop."""
    run = self._decoded(queries)
    seconds = seconds_of(run, least=0.0)
    return seconds / int(run().passes.max())

  def host(self, queries: int) -> Host:
    """An image of a window of so many queries, part by part."""
    pipe, decoder = self.pipe, SJD(window=queries)
    generate = lambda: pipe.generate(
        [self._text] * self.batch, decoder, batch=self.batch, **self._choices)
    passes = int(generate().passes.max())
    whole = min(generate().seconds for _ in range(5))
    drawing = seconds_of(self._decoded(queries), least=0.0)
    codes = jnp.zeros(
        (self.batch, pipe.model.grid.rows, pipe.model.grid.cols), jnp.int32)
    paint = jax.jit(pipe.family.decode)
    pixels = seconds_of(lambda: paint(pipe.vq_params, codes))
    start = time.perf_counter()
    pipe.family.encode_prompts([self._text] * self.batch, self._streams > 1)
    prompt = time.perf_counter() - start
    return Host(
        prompt, drawing, pixels, whole - drawing - pixels - prompt, passes)

  def trace(self, folder: Any, queries: int) -> None:
    """Writes what jax.profiler sees of one batch."""
    run = self._decoded(queries)
    jax.block_until_ready(run())
    with jax.profiler.trace(str(folder)):
      jax.block_until_ready(run())
