"""What generation will cost on devices that need not be there, before any
weight.

Everything is abstract: parameters are shapes with places on a mesh, compiled
ahead of time for the devices. One pass is counted twice, by hand and by XLA;
the time per pass is the larger of its operations and its bytes over what the
chip can do, and what its collectives take on top.
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
from ssd_jax.decoding import engine
from ssd_jax.decoding.sampling import Sampling, target
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
  """A family without weights.

  Attributes:
    family: Its prompts, grid and sampling.
    generator: The trunk, in the dtype it is used in.
    model: With heads and drafter.
    params: Shapes of all of them.
  """

  family: Family
  generator: Generator
  model: Model
  params: Params

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, dtype: Any) -> "Network":
    """The network of a config of configs/NAME.py."""
    settings, folder = {"config": config.to_dict()}, None
    if config.family == "emoji":  # its words are the embedded model's
      settings = read_json(model_folder.EMBEDDED / "model.json")
      folder = model_folder.EMBEDDED
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
    """The shapes of prompts of a sentence."""
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
    network: What generates.
    decoder: How.
    mesh: On which devices.
    batch: Images generated together.
  """

  network: Network
  decoder: Decoder
  mesh: Mesh
  batch: int

  @functools.cached_property
  def settings(self) -> tuple[Sampling, bool]:
    """(sampling, whether both streams are run), the family's own."""
    values = self.network.family.sampling
    return Sampling.make(**dict[str, Any](values)), values["guidance"] != 1.0

  @property
  def streams(self) -> int:
    """Guidance streams G."""
    return 1 + self.settings[1]

  @functools.cached_property
  def params(self) -> Params:
    """Shapes with places; only the parts that the decoder reads."""
    kinds = {"trunk"} | {"ssd": {"heads"}, "stair": {"heads"},
                         "exact": {"heads"}, "mtp": {"heads"},
                         "eagle": {"drafter"}, "lantern": {"drafter"},
                         "lanternpp": {"drafter"}, "cascade": {"drafter"}}.get(
                             self.decoder.name, set())
    params = {k: v for k, v in self.network.params.items() if k in kinds}
    if neighbours := getattr(self.decoder, "neighbours", 0):
      params["neighbours"] = jax.ShapeDtypeStruct(
          (self.network.model.vocab, neighbours), np.int32)
    return abstract(params, sharding.shardings(params, self.mesh))

  @functools.cached_property
  def prompt(self) -> Prompt:
    """Shapes of the prompts with places."""
    prompt = self.network.prompt(self.batch, self.streams > 1)
    return abstract(prompt, rows_of(prompt, self.mesh))

  @functools.cached_property
  def slots(self) -> int:
    """Slots of the cache."""
    model = self.network.model
    return (self.prompt.tokens.shape[1] + model.grid.length
            + self.decoder.scratch(model))

  @functools.cached_property
  def queries(self) -> int:
    """Q of the decoder's passes."""
    model, generator = self.network.model, self.network.generator

    def look(params, key):
      ctx = engine.Context(key, jnp.int32(0), jnp.int32(1), params,
                           self.settings[0], model)
      hidden = jnp.zeros(
          (self.streams, generator.cfg.d_model), generator.dtype)
      p_V = jnp.full(model.vocab, 1 / model.vocab)
      return self.decoder.propose(ctx, self.decoder.start(ctx, p_V, hidden))

    found = jax.eval_shape(look, self.params, jax.random.key(0))
    return found.tokens.shape[0]

  def compile_generation(self) -> Any:
    """The whole program of a batch, compiled."""
    key = jax.eval_shape(jax.random.key, 0)
    index = jax.ShapeDtypeStruct((self.batch,), np.int32)
    sampling, key, index = everywhere(
        (self.settings[0], key, index), self.mesh)
    shapes = (self.params, self.prompt, sampling, key, index)
    with jax.set_mesh(self.mesh):  # from here nothing may run
      return engine.decode.lower(
          self.network.model, self.decoder, *shapes).compile()

  def compile_pass(self) -> tuple[Any, Any]:
    """(a pass with a single layer, with none), compiled.

    All layers are alike, and a loop over them would hide what one costs: XLA
    counts its body once, and the whole cache for each slot that is written.
    """
    rows, generator = self.streams * self.batch, self.network.generator
    cfg = dataclasses.replace(generator.cfg, n_layers=1)
    model = dataclasses.replace(generator, cfg=cfg).model()
    trunk = self.network.params["trunk"]
    params = {"trunk": trunk | {"layers": jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype),
        trunk["layers"])}}
    params = abstract(params, sharding.shardings(params, self.mesh))
    shape = (1, rows, cfg.n_kv_heads, self.slots, cfg.head_dim)
    place = NamedSharding(self.mesh, sharding.cache_spec(shape, self.mesh))
    cache = jax.eval_shape(
        lambda: KVCache(*[jnp.zeros(shape, generator.dtype)] * 2))
    cache = abstract(cache, jax.tree.map(lambda _: place, cache))
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
    with jax.set_mesh(self.mesh):  # from here nothing may run
      return (jax.jit(one, donate_argnums=1).lower(*shapes).compile(),
              jax.jit(ends).lower(params, queries, sampling).compile())

  def _queries(self, rows: int) -> Queries:
    """Shapes of a pass's queries with places."""
    each = (rows, self.queries)
    length = self.slots - self.prompt.tokens.shape[1]
    ids = lambda: jnp.zeros(each, np.int32)
    queries = jax.eval_shape(lambda: Queries(
        ids(), ids(), ids(), jnp.zeros((*each, length), bool)))
    return abstract(queries, rows_of(queries, self.mesh))

  def counts(self, queries: int) -> tuple[float, float]:
    """(FLOPs, bytes) of a pass by hand, over all devices.

    Every weight and every slot of the cache is read once by each row of the
    mesh that holds it; scores of attention are written and read once.
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
    # Activations: in and out of attention and of the feed-forward part.
    moved += fed * cfg.n_layers * size * (12 * cfg.d_model + 3 * cfg.d_ff)
    return flops, moved + 3 * 4 * fed * cfg.vocab_out

  @property
  def _size(self) -> int:
    return np.dtype(self.network.generator.dtype).itemsize

  def matrix_weights(self) -> int:
    """Parameters that every query is multiplied with."""
    trunk = {k: v for k, v in self.params["trunk"].items()
             if k != "embedding" and not k.startswith("caption")}
    return count(trunk)


def text_for(family: Family) -> str:
  """A prompt that the family can generate."""
  return "0" if family.config.get("classes") else _TEXT


def abstract(tree: Any, places: Any) -> Any:
  """Shapes of a tree, with their places."""
  return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(
          jnp.shape(x), x.dtype, sharding=place), tree, places)


def everywhere(tree: Any, mesh: Mesh) -> Any:
  """Shapes of a tree that lies whole on every device."""
  return abstract(tree, jax.tree.map(
      lambda x: NamedSharding(mesh, PartitionSpec()), tree))


def rows_of(tree: Any, mesh: Mesh) -> Any:
  """Places of arrays that lead with rows."""
  return jax.tree.map(lambda x: NamedSharding(
      mesh, sharding.rows_spec(x.shape[0], x.ndim, mesh)), tree)


def count(tree: Any) -> int:
  """Numbers in a tree of arrays."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _as_type(tree: Any, dtype: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def memory_of(program: Any) -> int:
  """Bytes that a program needs on one device, its arguments among them."""
  plan = program.memory_analysis()
  return (plan.argument_size_in_bytes + plan.output_size_in_bytes
          + plan.temp_size_in_bytes - plan.alias_size_in_bytes)


def xla_counts(
    one: Any, ends: Any, layers: int, devices: int
) -> tuple[float, float]:
  """(FLOPs, bytes) of a pass by XLA, over all devices.

  Args:
    one: A pass with one layer, compiled.
    ends: With none.
    layers: Of the trunk.
    devices: That share the pass.
  """
  one, ends = (
      np.array([x.cost_analysis()[k] for k in ("flops", "bytes accessed")])
      for x in (one, ends))
  flops, moved = (ends + layers * (one - ends)) * devices
  return float(flops), float(moved)


def sent_by(
    one: Any, ends: Any, layers: int, devices: int
) -> list[compiled.Collective]:
  """Collectives of a pass; the arguments are those of `xla_counts`."""
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
  """Seconds that the parts of a pass of so many queries take at least.

  Args:
    plan: Of the generation.
    queries: Q.
    chip: Each of the devices.
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
  """The least time of a pass; the arguments are those of `parts`."""
  took = parts(plan, queries, chip, sent)
  return max(took["compute"], took["memory"]) + took["collectives"]


def out_of_memory(error: BaseException) -> int | None:
  """Bytes that a program would have needed, of the compiler's complaint."""
  units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  found = re.search(
      r"(?:[Uu]sed |required for [\w ]*\()([\d.]+)([KMGT])", str(error))
  return int(float(found[1]) * units[found[2]]) if found else None

