"""What a pipeline has compiled, on which devices, and for which weight layout.

Everything that is made once and used many times lives here: executables, the
layout in which the weights are multiplied, their replicas on the devices that
share a batch, and the tables that decoders ask for.
"""

from collections.abc import Callable
import copy
import functools
from typing import Any, cast

import flax.core
import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import Decoder, Family
from ssd_jax.core.types import Model, Params, Prompt
from ssd_jax.decoding import engine
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.decoding.trees.relaxed import neighbour_table
from ssd_jax.models import layouts
from ssd_jax.pipeline import completion, likelihood
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Clock, Listener


class Programs:
  """Compiled programs of one model with one set of parameters.

  Attributes:
    model: The network's functions.
    listener: What programs with a progress callback call.
  """

  def __init__(
      self, family: Family, params: Params, vq_params: Params, model: Model
  ):
    self._family, self.model = family, model
    self._params, self._vq_params = flax.core.unfreeze(params), vq_params
    self._executables: dict[Any, Any] = {}
    self._layouts: dict[bool, Params] = {}
    self._tables: dict[int, jax.Array] = {}
    self._replicas: dict[tuple[jax.sharding.Mesh, int], Params] = {}
    self._queries: dict[tuple[Decoder, Grid, int], int] = {}
    self.listener = Listener()

  def completing(self, rows: int) -> "Programs":
    """Returns the programs for images whose first rows are given.

    They are kept with these, and read the same weights.

    Args:
      rows: Number of given rows; 0 for none.
    """
    other = copy.copy(self)
    if rows:
      other.model = completion.remainder(self.model, rows)
    return other

  def on_model(self, model: Model) -> "Programs":
    """Returns the programs of another grid's model with these weights."""
    other = copy.copy(self)
    other.model = model
    return other

  def __len__(self) -> int:
    return len(self._executables)

  def num_queries(
      self, decoder: Decoder, prompt: Prompt, settings: Sampling, batch: int
  ) -> int:
    """Returns the number of slots that a pass feeds for one image."""
    key = (decoder, self.model.grid, len(prompt.tokens) // batch)
    if key not in self._queries:
      self._queries[key] = engine.count_queries(
          self.model, decoder, self.params_for(decoder), prompt, settings,
          batch)
    return self._queries[key]

  def mesh_for(
      self, decoder: Decoder, prompt: Prompt, settings: Sampling, batch: int
  ) -> jax.sharding.Mesh | None:
    """Returns the mesh of CPU devices that should share a batch, or None.

    See `sharding.cpu_mesh`.
    """
    rows = len(prompt.tokens)
    if sharding.cpu_mesh(rows, self.model.grid.length) is None:
      return None  # no number of queries would change that
    queries = self.num_queries(decoder, prompt, settings, batch)
    return sharding.cpu_mesh(rows, queries)

  def prompt_slots(self, decoder: Decoder, length: int) -> int:
    """Returns the slots to pad a prompt to; see `layouts.prompt_slots`."""
    model = self.model
    return layouts.prompt_slots(
        length, model.grid.length + decoder.scratch(model),
        jax.default_backend())

  def params_for(
      self, decoder: Decoder, mesh: jax.sharding.Mesh | None = None
  ) -> Params:
    """Returns the parameters in the layout that these devices multiply with.

    If the decoder needs the table of nearest codebook entries, it is among
    them. The table is made once, of the tokenizer's codebook or, without one,
    of the trunk's input embeddings.

    Args:
      decoder: Settings.
      mesh: What `mesh_for` returned.
    """
    params = self._layout()
    count = decoder.needs(self.model).neighbours
    if count >= 1 and "neighbours" not in params:
      if count not in self._tables:
        table_VK = neighbour_table(self._codebook_VE(), count)
        self._tables[count] = jnp.asarray(table_VK)
      params = {**params, "neighbours": self._tables[count]}
    if mesh is None:
      return params
    if (mesh, count) not in self._replicas:
      self._replicas[mesh, count] = sharding.replicate(params, mesh)
    return self._replicas[mesh, count]

  def _layout(self) -> Params:
    """Returns the layout for weights that a mesh shards, or for whole ones."""
    is_sharded = sharding.num_param_shards() > 1
    if is_sharded not in self._layouts:
      self._layouts[is_sharded] = layouts.inference_layout(self._params)
    return self._layouts[is_sharded]

  def _codebook_VE(self) -> np.ndarray:
    """Returns a vector of each image token, to measure distances between."""
    if self._vq_params is not None:
      return np.asarray(
          self._family.vq.apply({"params": self._vq_params}, method="codes"))
    tokens_V = jnp.arange(self.model.vocab)
    return np.asarray(self.model.embed(self._params, tokens_V), np.float32)

  def compile(
      self, function: Any, decoder: Decoder, *args: Any, **static: Any
  ) -> Callable[..., Any]:
    """Compiles `function(model, decoder, *args, **static)` for such arguments.

    Returns:
      The executable; it takes `args` alone, which start with the parameters.
    """
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), args[1:])
    leaves, structure = jax.tree.flatten(shapes)
    key = (decoder, self.model.grid, function.__name__, tuple(static.items()),
           tuple(map(str, leaves)), structure, sharding.current())
    if key not in self._executables:
      self._executables[key] = function.lower(
          self.model, decoder, *args, **static).compile()
    return cast(Callable[..., Any], self._executables[key])

  def forget(self, decoder: Decoder) -> None:
    """Drops the programs of a decoder."""
    for key in [key for key in self._executables if key[0] == decoder]:
      del self._executables[key]

  def decode_images(self, tokens: np.ndarray, clock: Clock) -> jax.Array:
    """Returns the images uint8 [B, H, W, 3] of grids int32 [B, R, C]."""
    rows = sharding.shard_rows(jnp.asarray(tokens))
    key = ("images", tokens.shape, sharding.current())
    if key not in self._executables:
      decode = jax.jit(self._family.decode).lower(self._vq_params, rows)
      self._executables[key] = clock.compile(decode.compile)
    return cast(jax.Array, self._executables[key](self._vq_params, rows))

  def peak_bytes(self, decoder: Decoder) -> int | None:
    """Returns the peak memory of the largest program of a decoder.

    It counts arguments (the weights among them), results and scratch memory as
    the compiler planned them. None if no program was compiled or the compiler
    does not say.
    """
    sizes = []
    for key, program in self._executables.items():
      plan = program.memory_analysis() if key[0] == decoder else None
      if plan is not None:
        sizes.append(
            plan.argument_size_in_bytes + plan.output_size_in_bytes
            + plan.temp_size_in_bytes - plan.alias_size_in_bytes)
    return max(sizes, default=None)

  @functools.cached_property
  def token_nll(self) -> Callable[..., list[jax.Array]]:
    """The jitted function of `likelihood.token_nll`."""
    return likelihood.token_nll(self._family.generator)

  @functools.cached_property
  def stream_logits(self) -> Callable[..., jax.Array]:
    """Jitted: (params, prompt, sequence [B, N]) -> logits [G, B, N, V]."""
    generator = self._family.generator

    @jax.jit
    def logits(params, prompt: Prompt, sequence):
      streams = prompt.tokens.shape[0] // sequence.shape[0]
      hidden = generator.hidden(
          params, prompt, jnp.concatenate([sequence] * streams))
      logits = generator.logits(params, hidden)
      return logits.reshape(streams, -1, *logits.shape[1:])

    return logits
