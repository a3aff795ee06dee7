"""The forms of a trunk's parameters that a CPU draws with.

*Layers apart.* Out of a stack of layers, of their caches or of spatial heads, a
CPU copies each before it multiplies, in every pass. So each has arrays of its
own.

*Tiles.* Of a matrix as it is stored a product reads a few columns of every row,
which for a handful of queries takes three times as long as reading it in one
run. So there is a second copy of it, with runs of columns in one piece each.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ssd_jax.core.types import Params
from ssd_jax.models import quantization
from ssd_jax.runtime import memory, sharding

# Bytes of layers; what is smaller lies in the caches closest to a core.
_LEAST = 4e6
# Columns of a tile, and rows of a device up to which tiles are faster: whole
# passes of the embedded model (AVX-512) took 1.22, 1.20, 1.09 and 1.01 times as
# long without them at 16, 20, 32 and 48 rows.
TILE, TILED_ROWS = 64, 32
# Dimensions of each matrix that are summed over, the first ones.
_SUMMED = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1,
           "head": 1}


def inference_layout(params: Params) -> Params:
  """The parameters; of a larger trunk on a CPU in other forms.

  "trunk" has its layers apart, and "tiles" is the same trunk in tiles, for
  passes of few rows. Of "heads" each direction is a list. They stay as they are
  where a mesh cuts them, where there is no room for copies, and where the trunk
  is no `Generator`'s: nobody else would find the layers.
  """
  trunk = params.get("trunk", {})
  if not (isinstance(trunk, dict) and "layers" in trunk):
    return params
  is_cpu = (
      jax.default_backend() == "cpu" and sharding.num_param_shards() == 1)
  bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  layers, heads = bytes_of(trunk["layers"]), bytes_of(params.get("heads", {}))
  free = memory.free()
  room = math.inf if free is None else free
  if not is_cpu or layers < _LEAST or 2 * layers + heads > room:
    return params
  trunk = unstacked(trunk)
  tiles = _tiled(trunk) if 3 * layers + heads <= room else {}
  found = {**params, "trunk": trunk, **tiles}
  if "heads" in params:
    found["heads"] = {
        name: _unstack_heads(stack) for name, stack in params["heads"].items()}
  return found


def unstacked(trunk: Params) -> Params:
  """A trunk's parameters with each layer's arrays by themselves."""
  layers = trunk["layers"]
  count = len(jax.tree.leaves(layers)[0])
  return {k: v for k, v in trunk.items() if k != "layers"} | {
      f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers)
      for i in range(count)}


def _unstack_heads(stack: Params) -> list[Params]:
  """The heads of a direction, a stack of one each."""
  count = len(jax.tree.leaves(stack)[0])
  return [jax.tree.map(lambda x, i=i: x[i:i + 1], stack) for i in range(count)]


def _tiled(trunk: Params) -> Params:
  """{"tiles": layers apart, so}; empty unless floats make whole tiles."""
  if quantization.is_quantized(trunk):
    return {}
  for path, x in jax.tree_util.tree_leaves_with_path(trunk):
    inputs = _SUMMED.get(path[-1].key)
    if inputs and math.prod(x.shape[inputs:]) % TILE:
      return {}

  def visit(path, x):
    inputs = _SUMMED.get(path[-1].key)
    return _tiles(x, inputs) if inputs else x

  return {"tiles": jax.tree_util.tree_map_with_path(visit, trunk)}


@functools.partial(jax.jit, static_argnums=1)
def _tiles(x: jax.Array, inputs: int) -> jax.Array:
  """[N / T, K, T] of a matrix with so many leading dimensions that are summed
  over."""
  rows = math.prod(x.shape[:inputs])
  return jnp.swapaxes(x.reshape(rows, -1, TILE), 0, 1)
