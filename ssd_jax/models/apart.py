"""The forms of a trunk's parameters that a CPU draws with.

*Layers apart.* A CPU copies each matrix out of its stack of layers before it
multiplies, in every pass. That takes as long as the product where layers are
larger than the processor's caches, and nothing to speak of where they are not.

*Tiles.* Of a matrix as it is stored a product reads a few columns of every row,
which for a handful of queries takes three times as long as reading it in one
run. So there is a second copy of it, with runs of columns in one piece each.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ssd_jax import memory, sharding
from ssd_jax.models import int8
from ssd_jax.types import Params

# Bytes of layers: from 110 MB on an AR pass was faster with them apart, at 20
# and 40 MB slower (two cores, 32 MB of cache).
_LEAST = 100e6
# What is smaller than this lies in the caches closest to a core.
_LEAST_TILED = 4e6
# Columns of a tile, and rows up to which tiles are faster (measured for 2 to 32
# rows, 256 x 768 matrices, AVX-512).
TILE, TILED_ROWS = 64, 16
# Dimensions of each matrix that are summed over, the first ones.
_SUMMED = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1,
           "head": 1}


def for_drawing(params: Params) -> Params:
  """The parameters; of a larger trunk on a CPU with further forms of it.

  "trunk" has its layers apart where that pays, and "tiles" is the same trunk in
  tiles, for passes of few rows. They stay as they are under a mesh, where there
  is no room for copies, and where the trunk is no `Generator`'s: nobody else
  would find the layers.
  """
  trunk = params.get("trunk", {})
  if not (isinstance(trunk, dict) and "layers" in trunk):
    return params
  if jax.default_backend() != "cpu" or sharding.current() is not None:
    return params
  size = sum(x.nbytes for x in jax.tree.leaves(trunk["layers"]))
  free = memory.free()
  room = math.inf if free is None else free
  forms = {}
  if size >= _LEAST and 2 * size <= room:
    forms["trunk"] = apart(trunk)
  if size >= _LEAST_TILED and (2 + len(forms)) * size <= room:
    forms |= _tiled(trunk)
  return {**params, **forms} if forms else params


def apart(trunk: Params) -> Params:
  """A trunk's parameters with each layer's arrays by themselves."""
  layers = trunk["layers"]
  count = len(jax.tree.leaves(layers)[0])
  return {k: v for k, v in trunk.items() if k != "layers"} | {
      f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers)
      for i in range(count)}


def _tiled(trunk: Params) -> Params:
  """{"tiles": the trunk so}; empty unless floats make whole tiles."""
  if int8.is_quantized(trunk):
    return {}
  paths_and_shapes, _ = jax.tree_util.tree_flatten_with_path(
      jax.eval_shape(apart, trunk))
  for path, x in paths_and_shapes:
    inputs = _SUMMED.get(path[-1].key)
    if inputs and math.prod(x.shape[inputs:]) % TILE:
      return {}

  def visit(path, x):
    inputs = _SUMMED.get(path[-1].key)
    return _tiles(x, inputs) if inputs else x

  return {"tiles": jax.tree_util.tree_map_with_path(visit, apart(trunk))}


@functools.partial(jax.jit, static_argnums=1)
def _tiles(x: jax.Array, inputs: int) -> jax.Array:
  """[N / T, K, T] of a matrix with so many leading dimensions that are summed
  over."""
  rows = math.prod(x.shape[:inputs])
  return jnp.swapaxes(x.reshape(rows, -1, TILE), 0, 1)
