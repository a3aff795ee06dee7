"""Cost of generation on devices that may be absent, without weights.

Everything is abstract: parameters are shapes with shardings, compiled ahead of
time for the devices. The operations and bytes of a pass are counted by hand and
by XLA. The time per pass is the roofline's, the larger of compute and memory
time, plus the time of the collectives.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_collections
import numpy as np

from ssd_jax.core.config import from_config_dict
from ssd_jax.core.protocols import Decoder, Family
from ssd_jax.core.types import KVCache, Model, Params, Prompt, Queries
from ssd_jax.decoding import continuous_batching, engine
from ssd_jax.decoding.sampling import Sampling, target
from ssd_jax.models import layouts
from ssd_jax.models.drafter import DraftNet, bind_drafter
from ssd_jax.models.generator import Generator
from ssd_jax.models.spatial_heads import (
  HeadsConfig,
  HeadsOptions,
  SpatialHeads,
  bind_heads,
)
from ssd_jax.performance import chips, compiled
from ssd_jax.pipeline import model_folder
from ssd_jax.runtime import sharding
from ssd_jax.storage.files import read_json

QUERIES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
_TEXT = "a watercolour of a lighthouse on a cliff at sunset, gulls in the wind"


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A network without weights.

  Attributes:
    family: Prompts, grid and sampling settings.
    generator: The trunk, in its inference dtype.
    model: The network's functions, heads and drafter included.
    params: Shapes of all parameters.
  """

  family: Family
  generator: Generator
  model: Model
  params: Params

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, dtype: Any) -> "Network":
    """Returns the network of a config of configs/NAME.py."""
    settings, folder = {"config": config.to_dict()}, None
    if config.family == "emoji":  # the vocabulary is the embedded model's
      folder = model_folder.EMBEDDED
      settings = read_json(folder / "model.json") | settings
    family = model_folder.FAMILIES[config.family](settings, folder)
    generator = dataclasses.replace(family.generator, dtype=dtype)
    options = from_config_dict(HeadsOptions, config.mtp.heads)
    heads = SpatialHeads(generator, HeadsConfig.make(generator, options))
    net = DraftNet(generator)
    make = lambda key: generator.init(key) | {
        "heads": heads.init(key), "drafter": net.init(key)}
    params = _as_type(jax.eval_shape(make, jax.random.key(0)), dtype)
    model = bind_drafter(generator, bind_heads(generator, heads.cfg))
    return cls(family, generator, model, params)

  def prompt(self, batch: int, guided: bool) -> Prompt:
    """Returns the shapes of `batch` prompts of one sentence."""
    trunk = self.generator.cfg
    if not trunk.caption_dim:
      texts = [text_for(self.family)] * batch
      return self.family.encode_prompts(texts, guided)[0]
    rows, slots = batch * (1 + guided), trunk.caption_slots
    return jax.eval_shape(lambda: Prompt(
        jnp.zeros((rows, slots), np.int32), jnp.zeros((rows, slots), bool),
        jnp.zeros((rows, slots + self.model.grid.length), np.int32),
        jnp.zeros((rows, slots, trunk.caption_dim), self.generator.dtype)))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """Generation with one decoder on one mesh.

  Attributes:
    network: The network.
    decoder: Settings of the decoder.
    mesh: Mesh of the devices.
    batch: Images generated together.
  """

  network: Network
  decoder: Decoder
  mesh: Mesh
  batch: int

  @functools.cached_property
  def settings(self) -> tuple[Sampling, bool]:
    """(sampling, whether two guidance streams run) of the family."""
    values = self.network.family.sampling
    return Sampling.make(**dict[str, Any](values)), values["guidance"] != 1.0

  @property
  def streams(self) -> int:
    """Number of guidance streams G."""
    return 1 + self.settings[1]

  @functools.cached_property
  def params(self) -> Params:
    """Shapes and shardings of the parameters that the decoder reads."""
    needs = self.decoder.needs(self.network.model)
    kinds = {"trunk"}
    kinds |= {"heads"} if needs.horizontal or needs.vertical else set()
    kinds |= {"drafter"} if needs.drafter else set()
    params = {k: v for k, v in self.network.params.items() if k in kinds}
    if self.is_unstacked:
      params = jax.eval_shape(layouts.unstacked, params)
    if neighbours := needs.neighbours:
      params["neighbours"] = jax.ShapeDtypeStruct(
          (self.network.model.vocab, neighbours), np.int32)
    return abstract(params, sharding.shardings(params, self.mesh))

  @property
  def platform(self) -> str:
    """JAX's name of the devices' kind."""
    return self.mesh.devices.flat[0].platform

  @property
  def is_unstacked(self) -> bool:
    """Whether the devices read layers of their own, see models/layouts.py."""
    return self.platform == "gpu"

  @property
  def stacked_bytes(self) -> int:
    """Bytes per device of the loaded stacks beside unstacked layers and heads.

    See `layouts.inference_layout`; 0 where the stacks themselves are read.
    """
    if not self.is_unstacked:
      return 0
    stacks = [self.network.params["trunk"]["layers"]]
    if "heads" in self.params:
      stacks.append(self.network.params["heads"])
    return count(stacks) * self._size // (
        self.mesh.shape["fsdp"] * self.mesh.shape["tensor"])

  @functools.cached_property
  def prompt(self) -> Prompt:
    """Shapes and shardings of the prompts."""
    prompt, model = (
        self.network.prompt(self.batch, self.streams > 1), self.network.model)
    slots = layouts.prompt_slots(
        prompt.tokens.shape[1], model.grid.length + self.decoder.scratch(model),
        self.platform)
    prompt = jax.eval_shape(
        lambda prompt: continuous_batching.widen(prompt, slots), prompt)
    return abstract(prompt, rows_of(prompt, self.mesh))

  @functools.cached_property
  def slots(self) -> int:
    """Number of slots of the cache."""
    model = self.network.model
    return (self.prompt.tokens.shape[1] + model.grid.length
            + self.decoder.scratch(model))

  @functools.cached_property
  def queries(self) -> int:
    """Number of queries Q in a pass of the decoder."""
    return engine.count_queries(
        self.network.model, self.decoder, self.params, self.prompt,
        self.settings[0], self.batch)

  def compile_generation(self) -> Any:
    """Returns the compiled program of a batch."""
    key = jax.eval_shape(jax.random.key, 0)
    index = jax.ShapeDtypeStruct((self.batch,), np.int32)
    sampling, key, index = everywhere(
        (self.settings[0], key, index), self.mesh)
    shapes = (self.params, self.prompt, sampling, key, index)
    with jax.set_mesh(self.mesh):  # nothing may run here
      return engine.decode.lower(
          self.network.model, self.decoder, *shapes).compile()

  def compile_pass(self) -> tuple[Any, Any]:
    """Returns (pass with a single layer, pass without layers), compiled.

    All layers are equal, and a loop over them would hide the cost of one: XLA
    counts the loop body once, and the whole cache for each slot that is
    written.
    """
    rows, generator = self.streams * self.batch, self.network.generator
    cfg = dataclasses.replace(generator.cfg, n_layers=1)
    model = dataclasses.replace(generator, cfg=cfg).model()
    trunk = self.network.params["trunk"]
    params = {"trunk": trunk | {"layers": jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype),
        trunk["layers"])}}
    if self.is_unstacked:
      params = jax.eval_shape(layouts.unstacked, params)
    params = abstract(params, sharding.shardings(params, self.mesh))
    shape = (1, rows, cfg.n_kv_heads, self.slots, cfg.head_dim)
    layout = NamedSharding(self.mesh, sharding.cache_spec(shape, self.mesh))
    cache = jax.eval_shape(
        lambda: KVCache(*[jnp.zeros(shape, generator.dtype)] * 2))
    if self.is_unstacked:
      cache = KVCache.from_layers([cache])
    cache = abstract(cache, jax.tree.map(lambda _: layout, cache))
    queries = self._queries(rows)
    sampling = everywhere(self.settings[0], self.mesh)

    def finish(params, hidden, sampling):
      hidden = hidden.reshape(self.streams, -1, *hidden.shape[1:])
      return target(model.logits(params, hidden), sampling)

    def one(params, cache, prompt, queries, sampling):
      hidden, cache = model.forward(params, cache, prompt, queries)
      cache = sharding.constrain_cache(cache)
      return finish(params, hidden, sampling), cache

    def ends(params, queries, sampling):
      return finish(params, model.embed(params, queries.tokens), sampling)

    shapes = (params, cache, self.prompt, queries, sampling)
    with jax.set_mesh(self.mesh):  # nothing may run here
      return (jax.jit(one, donate_argnums=1).lower(*shapes).compile(),
              jax.jit(ends).lower(params, queries, sampling).compile())

  def _queries(self, rows: int) -> Queries:
    """Returns shapes and shardings of a pass's queries."""
    each = (rows, self.queries)
    length = self.slots - self.prompt.tokens.shape[1]
    ids = lambda: jnp.zeros(each, np.int32)
    queries = jax.eval_shape(lambda: Queries(
        ids(), ids(), ids(), jnp.zeros((*each, length), bool)))
    return abstract(queries, rows_of(queries, self.mesh))

  def counts(self, queries: int) -> tuple[float, float]:
    """Returns (FLOPs, bytes) of a pass over all devices, counted by hand.

    Each row shard of the mesh reads every weight once; every slot of the cache
    is read once; attention scores are written and read once.
    """
    cfg = self.network.generator.cfg
    rows, size = self.streams * self.batch, self._size
    fed, attended = rows * queries, rows * queries * self.slots
    weights = self.matrix_weights()
    flops = 2 * fed * weights
    flops += 4 * attended * cfg.n_layers * cfg.n_heads * cfg.head_dim
    kept = rows * self.slots * cfg.n_kv_heads * cfg.head_dim * cfg.n_layers
    moved = (
      weights * size * sharding.num_row_shards(self.mesh) + 2 * kept * size
    )
    moved += 2 * 4 * attended * cfg.n_layers * cfg.n_heads
    # Activations in and out of attention and of the feed-forward part.
    moved += fed * cfg.n_layers * size * (12 * cfg.d_model + 3 * cfg.d_ff)
    return flops, moved + 3 * 4 * fed * cfg.vocab_out

  @property
  def _size(self) -> int:
    return np.dtype(self.network.generator.dtype).itemsize

  def matrix_weights(self) -> int:
    """Returns the number of weights that multiply every query."""
    trunk = {k: v for k, v in self.params["trunk"].items()
             if k != "embedding" and not k.startswith("caption")}
    return count(trunk)


def text_for(family: Family) -> str:
  """Returns a prompt that the family can generate."""
  return "0" if family.config.get("classes") else _TEXT


def abstract(tree: Any, places: Any) -> Any:
  """Returns the shapes of a tree with the shardings `places`."""
  return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(
          jnp.shape(x), x.dtype, sharding=place), tree, places)


def everywhere(tree: Any, mesh: Mesh) -> Any:
  """Returns the shapes of a tree that is replicated on every device."""
  return abstract(tree, jax.tree.map(
      lambda x: NamedSharding(mesh, PartitionSpec()), tree))


def rows_of(tree: Any, mesh: Mesh) -> Any:
  """Returns the shardings of arrays whose first axis holds rows."""
  return jax.tree.map(lambda x: NamedSharding(
      mesh, sharding.rows_spec(x.shape[0], x.ndim, mesh)), tree)


def count(tree: Any) -> int:
  """Returns the number of elements in a tree of arrays."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _as_type(tree: Any, dtype: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def memory_of(program: Any) -> int:
  """Returns the bytes that a program and its arguments need on one device."""
  plan = program.memory_analysis()
  return (plan.argument_size_in_bytes + plan.output_size_in_bytes
          + plan.temp_size_in_bytes - plan.alias_size_in_bytes)


def xla_counts(
    one: Any, ends: Any, layers: int, devices: int
) -> tuple[float, float] | None:
  """Returns (FLOPs, bytes) of a pass over all devices, counted by XLA.

  None for GPUs, whose compiler counts only where one is.

  Args:
    one: Compiled pass with one layer.
    ends: Compiled pass without layers.
    layers: Number of layers of the trunk.
    devices: Number of devices that share the pass.
  """
  found = [x.cost_analysis() for x in (one, ends)]
  if not all(found):
    return None
  one, ends = (
      np.array([x[k] for k in ("flops", "bytes accessed")]) for x in found)
  flops, moved = (ends + layers * (one - ends)) * devices
  return float(flops), float(moved)


def sent_by(
    one: Any, ends: Any, layers: int, devices: int
) -> list[compiled.Collective]:
  """Returns the collectives of a pass; takes the arguments of `xla_counts`."""
  read = lambda program: compiled.collectives(program.as_text(), devices)
  base = {x.kind: x for x in read(ends)}
  found = []
  for x in read(one):
    less = base.get(x.kind, compiled.Collective(x.kind, 0, 0, 1))
    grow = lambda a, b: b + layers * max(a - b, 0)
    found.append(compiled.Collective(
        x.kind, grow(x.count, less.count), grow(x.bytes, less.bytes), x.group))
  return found


def parts(
  plan: Plan,
  queries: int,
  chip: chips.Chip,
  sent: Sequence[compiled.Collective],
) -> dict[str, float]:
  """Returns the least seconds of the parts of a pass.

  Args:
    plan: The generation to plan.
    queries: Number of queries Q of the pass.
    chip: Figures of each device.
    sent: Collectives of a pass of `plan.queries`; their bytes grow with Q.
  """
  devices = plan.mesh.size
  flops, moved = plan.counts(queries)
  scale = queries / plan.queries
  waits = sum(
      dataclasses.replace(x, bytes=int(x.bytes * scale)).seconds(
          chip.link, chips.HOP_SECONDS) for x in sent)
  return {"compute": flops / devices / chip.flops,
          "memory": moved / devices / chip.bandwidth, "collectives": waits}


def seconds(
  plan: Plan,
  queries: int,
  chip: chips.Chip,
  sent: Sequence[compiled.Collective],
) -> float:
  """Returns the least seconds of a pass; takes the arguments of `parts`."""
  took = parts(plan, queries, chip, sent)
  return max(took["compute"], took["memory"]) + took["collectives"]


def out_of_memory(error: BaseException) -> int | None:
  """Returns the bytes that a program needs, read from the compiler's error."""
  units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  found = re.search(
      r"(?:[Uu]sed |required for [\w ]*\()([\d.]+)([KMGT])", str(error))
  return int(float(found[1]) * units[found[2]]) if found else None

