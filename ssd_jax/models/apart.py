"""Layers apart: the form of a large trunk's parameters that a CPU draws with.

A CPU copies each matrix out of its stack of layers before it multiplies, in
every pass. That takes as long as the product where layers are larger than the
processor's caches, and nothing to speak of where they are not.
"""

import jax

from ssd_jax import memory, sharding
from ssd_jax.types import Params

# Bytes of layers: from 110 MB on an AR pass was faster with them apart, at 20
# and 40 MB slower (two cores, 32 MB of cache).
_LEAST = 100e6


def for_drawing(params: Params) -> Params:
  """The parameters; of a large trunk on a CPU with a copy of layers, apart.

  They stay as they are under a mesh, where there is no room for the copy, and
  where the trunk is no `Generator`'s: nobody else would find the layers.
  """
  trunk = params.get("trunk", {})
  if not (isinstance(trunk, dict) and "layers" in trunk):
    return params
  is_cpu = jax.default_backend() == "cpu" and sharding.current() is None
  size = sum(x.nbytes for x in jax.tree.leaves(trunk["layers"]))
  room = memory.free()
  if not is_cpu or size < _LEAST or (room is not None and 2 * size > room):
    return params
  return {**params, "trunk": apart(trunk)}


def apart(trunk: Params) -> Params:
  """A trunk's parameters with each layer's arrays by themselves."""
  layers = trunk["layers"]
  count = len(jax.tree.leaves(layers)[0])
  return {k: v for k, v in trunk.items() if k != "layers"} | {
      f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers)
      for i in range(count)}
