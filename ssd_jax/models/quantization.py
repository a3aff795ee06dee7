"""Weight-only int8 quantisation of large matrices.

Each output channel has a float32 scale, its largest absolute weight over 127.
Weights are dequantised inside the layer that uses them, so a pass reads int8
from memory; activations, cache, norms and the input table stay floats. qwix,
from the extra "int8", quantises the weights.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError
from ssd_jax.core.extras import need
from ssd_jax.core.types import Params
from ssd_jax.core.weights import path_of, weight_of
from ssd_jax.runtime import sharding


def quantize(params: Params) -> Params:
  """Quantises the matrices of trunk and spatial heads to int8.

  Raises:
    UserError: The extra is not installed, the weights are sharded, or they are
      already quantised.
  """
  qwix = need("qwix", "int8")
  if sharding.num_param_shards() > 1:
    raise UserError(
        "Expected unsharded weights for int8, got weights that several devices "
        "share. Use --mesh data=N alone, or omit int8.")
  if is_quantized(params):
    raise UserError(
        "Expected floating-point weights, got weights in int8. Quantise them "
        "once.")

  @functools.partial(jax.jit, static_argnums=1)
  def pack(x, kept):
    return qwix.quantize(
        x, jnp.int8, channelwise_axes=kept, scale_dtype=jnp.float32)

  def visit(path, x):
    weight = weight_of(path_of(path), x.ndim)
    if weight is None or not weight.int8:
      return x
    first = x.ndim - len(weight.axes)
    contracted = range(first, first + weight.contracted)
    return pack(x, tuple(i for i in range(x.ndim) if i not in contracted))

  return jax.tree_util.tree_map_with_path(visit, params)


def is_quantized(params: Params) -> bool:
  """Returns whether any of the parameters are in int8."""
  return any(map(_is_packed, jax.tree.leaves(params, is_leaf=_is_packed)))


def dequantize(params: Params) -> Params:
  """Converts int8 parameters to floats; others stay unchanged."""
  unpack = lambda x: (
      x.qvalue.astype(x.scale.dtype) * x.scale if _is_packed(x) else x)
  return jax.tree.map(unpack, params, is_leaf=_is_packed)


def dequantized(module: type[nn.Module]) -> type[nn.Module]:
  """Returns a module like `module` that takes its parameters in int8."""
  return nn.map_variables(module, "params", dequantize)


def _is_packed(x: Any) -> bool:
  return hasattr(x, "qvalue")
