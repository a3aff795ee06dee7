"""Layouts of a trunk's parameters for inference on a CPU or a GPU.

*Unstacked layers.* From a stack of layers, of their caches or of spatial heads,
XLA copies each slice before it multiplies, in every pass: on a CPU, and on a
GPU, where a pass would move three times the bytes. With unstacked layers each
has its own arrays. A TPU reads slices where they are.

*Tiles.* On a CPU, a matmul with a row-major matrix reads a few columns of every
row, which for a handful of queries takes three times as long as reading the
matrix contiguously. So there is a second copy, whose tiles of columns are
contiguous.

*Blocks of slots.* On a GPU, matmuls take slots of the cache in blocks. To fill
the last one, XLA would copy the values of all slots in every pass, so prompts
are padded instead.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ssd_jax.core.types import Params
from ssd_jax.core.weights import path_of, weight_of
from ssd_jax.models import quantization
from ssd_jax.runtime import memory, sharding

# Bytes of all layers below which nothing changes: they fit the CPU's caches.
_MIN_BYTES = 4e6
# Columns of a tile, and rows per device up to which tiles are faster. Without
# tiles, passes of the embedded model (AVX-512) took 1.22, 1.20, 1.09 and 1.01
# times as long at 16, 20, 32 and 48 rows.
TILE, TILED_ROWS = 64, 32
_SLOT_BLOCK = 64


def inference_layout(params: Params) -> Params:
  """Returns the parameters in the layout that inference uses.

  On a CPU and on GPUs they are `unstacked`; on a CPU, "tiles" is the same trunk
  in tiles, for passes of few rows. The parameters stay unchanged if the trunk
  is small, if a mesh of CPU devices shards them, if memory does not suffice for
  the copies, or if the trunk is not that of a `Generator`, which alone knows
  these layouts.
  """
  trunk = params.get("trunk", {})
  if not (isinstance(trunk, Mapping) and "layers" in trunk):
    return params
  platform, num_shards = jax.default_backend(), sharding.num_param_shards()
  is_read = platform == "gpu" or (platform == "cpu" and num_shards == 1)
  bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  layers = bytes_of(trunk["layers"]) // num_shards
  heads = bytes_of(params.get("heads", {})) // num_shards
  free = memory.free_bytes()
  room = math.inf if free is None else free
  if not is_read or layers < _MIN_BYTES or 2 * layers + heads > room:
    return params
  found = unstacked(params)
  if platform == "cpu" and 3 * layers + heads <= room:
    found |= _tiled(found["trunk"])
  return sharding.shard_params(found) if num_shards > 1 else found


def prompt_slots(length: int, others: int, platform: str) -> int:
  """Returns the prompt slots, at least `length`, that fill blocks of slots.

  Args:
    length: Slots of the prompt.
    others: All other slots of the cache.
    platform: JAX's name of the devices' kind, such as "gpu".
  """
  return length + (-(length + others) % _SLOT_BLOCK if platform == "gpu" else 0)


def unstacked(params: Params) -> Params:
  """Returns parameters with separate arrays for each layer and each head."""
  found = {**params, "trunk": unstack_layers(params["trunk"])}
  if "heads" in params:
    found["heads"] = {
        name: _unstack_heads(stack) for name, stack in params["heads"].items()}
  return found


def unstack_layers(trunk: Params) -> Params:
  """Returns a trunk's parameters with separate arrays for each layer."""
  layers = trunk["layers"]
  count = len(jax.tree.leaves(layers)[0])
  return {k: v for k, v in trunk.items() if k != "layers"} | {
      f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers)
      for i in range(count)}


def _unstack_heads(stack: Params) -> list[Params]:
  """Splits the heads of a direction into stacks of one head each."""
  count = len(jax.tree.leaves(stack)[0])
  return [jax.tree.map(lambda x, i=i: x[i:i + 1], stack) for i in range(count)]


def _tiled(trunk: Params) -> Params:
  """Returns {"tiles": unstacked layers in tiles}.

  The result is empty if weights are quantised or columns do not fill the tiles.
  """
  if quantization.is_quantized(trunk):
    return {}
  for path, x in jax.tree_util.tree_leaves_with_path(trunk):
    inputs = _tiled_inputs(path, x)
    if inputs and math.prod(x.shape[inputs:]) % TILE:
      return {}

  def visit(path, x):
    inputs = _tiled_inputs(path, x)
    return _tiles(x, inputs) if inputs else x

  return {"tiles": jax.tree_util.tree_map_with_path(visit, trunk)}


def _tiled_inputs(path: Any, x: jax.Array) -> int:
  """Returns a matrix's contracted dimensions; 0 if it is left as it is."""
  weight = weight_of(path_of(path), x.ndim)
  return weight.contracted if weight and weight.tiled else 0


@functools.partial(jax.jit, static_argnums=1)
def _tiles(x: jax.Array, inputs: int) -> jax.Array:
  """Returns the tiles [N / T, K, T] of a matrix.

  Args:
    x: A matrix.
    inputs: Number of leading dimensions that are contracted.
  """
  rows = math.prod(x.shape[:inputs])
  return jnp.swapaxes(x.reshape(rows, -1, TILE), 0, 1)
