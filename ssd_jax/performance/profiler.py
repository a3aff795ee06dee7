"""Time of a pass by parts, compared with the machine's roofline.

The parts of a pass are the engine's own functions, each compiled by itself and
timed on the arrays of a pass in the middle of an image. The whole pass is
measured in the real loop; its time beyond the parts is the loop's own. The
roofline's bandwidth and arithmetic are measured in the same run. Everything
runs on the devices that generation with the same number of queries uses: from
some number of queries on, a CPU's cores share the rows of a pass
(`sharding.cpu_mesh`).
"""

from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ssd_jax.core.types import KVCache, Queries
from ssd_jax.decoding import acceptance, engine, sampling as sampling_lib
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.jacobi.sjd import SJD
from ssd_jax.decoding.sampling import Overrides
from ssd_jax.models import attention
from ssd_jax.performance import roofline
from ssd_jax.performance.roofline import Machine, seconds_of
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import sharding

QUERIES = (1, 2, 4, 8, 16, 32, 64)
_CALLS = 8  # calls of a part in the timed program
PARTS = ("trunk", "head", "sampling", "acceptance", "drafting")


@dataclasses.dataclass(frozen=True)
class Row:
  """Figures of a pass; times are in seconds.

  Attributes:
    queries: Number of queries Q.
    devices: Number of devices that share the rows.
    parts: Time of each of PARTS; the trunk includes attention. None for parts
      that the model lacks.
    attention: Time of all layers' products with the cache.
    whole: Time of a pass of the loop.
    passes: Passes of the image that was generated to measure `whole`.
    bytes: Bytes that must move: keys and values once, weights once per device.
    flops: Operations of the pass.
    least: Time by the roofline.
  """

  queries: int
  devices: int
  parts: dict[str, float | None]
  attention: float
  whole: float
  passes: int
  bytes: float
  flops: float
  least: float

  @property
  def rest(self) -> float:
    """Time of the loop beyond the parts that a pass of SJD has."""
    return self.whole - sum(
        self.parts[k] or 0.0 for k in PARTS if k != "drafting")


@dataclasses.dataclass(frozen=True)
class Host:
  """Time of an image from text to pixels with the last row's decoder; seconds.

  Attributes:
    prompt: Encoding of the prompt.
    drawing: The decoding loop.
    pixels: Decoding of tokens to pixels.
    rest: Everything else: Python, calls and copies.
    passes: Passes of the image.
  """

  prompt: float
  drawing: float
  pixels: float
  rest: float
  passes: int


def _timed(
    function: Callable, args: tuple, index: int | None = None, carry: Any = None
) -> float:
  """Returns the seconds of one of several dependent calls in a program.

  Each call waits for the previous one within one program, so that the overhead
  of calling a program with all arrays of a model is not counted.

  Args:
    function: (carry, *args) -> (result, carry).
    args: Arguments of every call.
    index: Index of the float argument that depends on the previous call's
      results; None if the carry does.
    carry: Arrays that each call donates and returns.
  """

  def several(carry, *args):
    def once(_, before):
      carry, waited = before
      given = list(args)
      if index is not None:
        given[index] += (1e-30 * waited).astype(given[index].dtype)
      result, carry = function(carry, *given)
      every = [jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(result)]
      return carry, jnp.clip(sum(every), -1.0, 1.0)

    return jax.lax.fori_loop(0, _CALLS, once, (carry, jnp.float32(0)))

  run, held = jax.jit(several, donate_argnums=0), [carry]

  def call():
    held[0], last = run(held[0], *args)
    return last

  return seconds_of(call) / _CALLS


class Profiler:
  """Measures a model's passes on some devices.

  Attributes:
    pipe: The model.
    batch: Images generated together.
    mesh: Mesh of the cores that share rows; None uses the current mesh.
  """

  def __init__(
      self, pipe: Pipeline, text: str, batch: int, mesh: Mesh | None = None,
      **sampling: Unpack[Overrides],
  ):
    self.pipe, self.batch, self.mesh = pipe, batch, mesh
    self._text, self._choices = text, sampling
    self._settings, guided = pipe.sampling(**sampling)
    self._streams = 1 + guided
    prompt, _ = pipe.family.encode_prompts([text] * batch, guided)
    prefill = lambda params, prompt: sharding.constrain_cache(
        pipe.model.prefill(params, prompt, 0)[1])
    with self._on_devices():
      self._params = pipe.programs.params_for(AR(), mesh)
      self._prompt = sharding.shard_rows(prompt)
      self._cache = jax.jit(prefill)(self._params, self._prompt)
    self._programs: dict[int, Any] = {}

  def _on_devices(self):
    return sharding.use_mesh(self.mesh)

  @property
  def devices(self) -> int:
    """Number of devices that share the rows of a pass."""
    return sharding.num_row_shards(self.mesh or sharding.current())

  @functools.cached_property
  def counts(self) -> tuple[int, int]:
    """(bytes that a pass reads, weights that multiply queries).

    The bytes are those of the weights, once per device, and of the cache.
    """
    trunk = {k: v for k, v in self._params["trunk"].items()
             if k != "embedding" and not k.startswith("caption")}
    leaves = jax.tree.leaves(trunk)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    moved = self.devices * size(trunk) + size(self._cache)
    return moved, sum(x.size for x in leaves)

  @functools.cached_property
  def machine(self) -> Machine:
    """Measured figures of the devices together."""
    with self._on_devices():
      return roofline.measure_machine(
          self.counts[0], self.pipe.family.generator.dtype)

  def row(self, queries: int) -> Row:
    """Measures a pass with the given number of queries."""
    makers = dict(
        trunk=self._trunk, head=self._head, sampling=self._sampling,
        acceptance=self._acceptance, drafting=self._drafting)
    with self._on_devices():
      made = {name: makers[name](queries) for name in PARTS}
      parts = {k: None if v is None else _timed(*v) for k, v in made.items()}
      attention = _timed(*self._attention(queries))
    machine = self.machine
    moved, weights = self.counts
    fed, cfg = self._rows * queries, self.pipe.family.generator.cfg
    attended = fed * cfg.n_layers * self._cache.shape[3]
    flops = 2.0 * fed * weights + 4.0 * attended * cfg.n_heads * cfg.head_dim
    return Row(
        queries, self.devices, parts, attention, *self.whole(queries), moved,
        flops, max(moved / machine.bandwidth, flops / machine.flops))

  @property
  def _rows(self) -> int:
    return self._streams * self.batch

  @property
  def _dtype(self) -> jnp.dtype:
    return self.pipe.family.generator.dtype

  def _queries(self, count: int) -> Queries:
    """Returns queries at slots in the middle of the image."""
    grid = self.pipe.model.grid
    slots = jnp.arange(count) + max(0, (grid.length - count) // 2)
    one = Queries(
        jnp.zeros(count, jnp.int32), jnp.minimum(slots, grid.length - 1),
        slots, jnp.arange(grid.length) <= slots[:, None])
    return sharding.shard_rows(
        jax.tree.map(lambda x: jnp.stack([x] * self._rows), one))

  # The following functions return the arguments of `_timed`.

  def _trunk(self, count: int):
    """The forward pass; the cache is donated as in the loop."""
    def run(cache, params, prompt, queries):
      return self.pipe.model.forward(params, cache, prompt, queries)

    args = self._params, self._prompt, self._queries(count)
    return run, args, None, jax.tree.map(jnp.copy, self._cache)

  def _attention(self, count: int):
    """All layers' products with the cache, one after the other."""
    cfg, cache = self.pipe.family.generator.cfg, self._cache
    q = self._normal(self._rows, count, cfg.n_heads, cfg.head_dim)
    visible = jnp.ones((self._rows, count, cache.shape[3]), bool)

    def run(_, cache: KVCache, q, visible):
      for layer in cache.layers():
        q = attention.attend(q, layer.k[0], layer.v[0], visible)
      return q, None

    q = q.astype(self._dtype)
    return run, (cache, *sharding.shard_rows((q, visible))), 1

  def _head(self, count: int):
    def run(_, params, hidden):
      return self.pipe.model.logits(params, hidden), None

    return run, (self._params, self._hidden(count)), 1

  def _hidden(self, count: int) -> jax.Array:
    """Returns random states [G, B, Q, D], sharded like those of the loop."""
    return sharding.shard_rows(self._normal(
        self._streams, self.batch, count, self._hidden_width
    ).astype(self._dtype))

  @property
  def _hidden_width(self) -> int:
    generator = self.pipe.family.generator
    return generator.cfg.d_model * (1 + len(generator.taps))

  def _sample(self, logits, key, slots):
    """Returns the target of the streams' logits and a sample for each slot."""
    p_BQV = sampling_lib.target(logits, self._settings)

    def sample(p_QV, image):
      noise_QV = sampling_lib.token_noise(key, image, slots, p_QV.shape[-1])
      return sampling_lib.sample(p_QV, noise_QV)

    return p_BQV, jax.vmap(sample)(p_BQV, jnp.arange(self.batch))

  def _sampling(self, count: int):
    logits = sharding.shard_rows(self._normal(
        self._streams, self.batch, count, self.pipe.model.vocab))
    run = lambda _, *args: (self._sample(*args), None)
    return run, (logits, jax.random.key(0), jnp.arange(count)), 0

  def _acceptance(self, count: int):
    """The verification of each draft and the residual of rejected drafts."""
    shape = (self.batch, count, self.pipe.model.vocab)
    p, q = (jax.nn.softmax(self._normal(*shape, seed=i)) for i in (1, 2))
    tokens = jnp.zeros((self.batch, count), jnp.int32)
    drafts = Drafts(tokens, q, tokens > 0)

    def verify(p_QV, drafts, u_Q):
      accepted = acceptance.accept_exact(p_QV, drafts, u_Q)
      return (acceptance.count_prefix(accepted),
              acceptance.residual(p_QV, drafts))

    run = lambda _, *args: (jax.vmap(verify)(*args), None)
    return run, (p, drafts, jnp.full((self.batch, count), 0.5)), 0

  def _drafting(self, count: int):
    """Drafting of one token per query with a spatial head."""
    model = self.pipe.model
    if not any(model.heads):
      return None
    direction = "vertical" if model.heads[1] else "horizontal"
    tokens = jnp.zeros((self._streams, self.batch, count), jnp.int32)

    def draft(_, params, hidden, tokens, key, slots):
      logits = model.draft(params, direction, 1, hidden, tokens)
      return self._sample(logits, key, slots), None

    return draft, (
        self._params, self._hidden(count), sharding.shard_rows(tokens),
        jax.random.key(0), jnp.arange(count)), 1

  def _normal(self, *shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)

  def _decoded(self, queries: int) -> Callable[[], engine.Decoded]:
    """Returns a function that generates a batch with a window of `queries`."""
    args = (self._params, self._prompt, self._settings, jax.random.key(0),
            jnp.arange(self.batch))
    with self._on_devices():
      if queries not in self._programs:
        self._programs[queries] = engine.decode.lower(
            self.pipe.model, SJD(window=queries), *args).compile()
    return lambda: self._programs[queries](*args)

  def whole(self, queries: int) -> tuple[float, int]:
    """Returns (seconds per pass of the loop, passes of the generated batch)."""
    run = self._decoded(queries)
    seconds, passes = seconds_of(run, least=0.0), int(run().passes.max())
    return seconds / passes, passes

  def host(self, queries: int) -> Host:
    """Measures the parts of an image with a window of `queries`."""
    pipe, decoder = self.pipe, SJD(window=queries)
    generate = lambda: pipe.generate(
        [self._text] * self.batch, decoder, batch=self.batch, **self._choices)
    passes = int(generate().passes.max())
    whole = min(generate().seconds for _ in range(5))
    decoding = seconds_of(self._decoded(queries), least=0.0)
    tokens = jnp.zeros(
        (self.batch, pipe.model.grid.rows, pipe.model.grid.cols), jnp.int32)
    decode_images = jax.jit(pipe.family.decode)
    pixels = seconds_of(lambda: decode_images(pipe.vq_params, tokens))
    start = time.perf_counter()
    pipe.family.encode_prompts([self._text] * self.batch, self._streams > 1)
    prompt = time.perf_counter() - start
    return Host(
        prompt, decoding, pixels, whole - decoding - pixels - prompt, passes)

  def trace(self, folder: Any, queries: int) -> None:
    """Writes jax.profiler's trace of one batch."""
    run = self._decoded(queries)
    jax.block_until_ready(run())
    with jax.profiler.trace(str(folder)):
      jax.block_until_ready(run())
