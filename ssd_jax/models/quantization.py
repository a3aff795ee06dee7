"""Weight-only int8: large matrices in a byte per number.

Each output channel has a float32 scale, its largest weight over 127. Weights
become floats again inside the layer that multiplies by them, so what is read
from memory in a pass is the bytes; activations, cache, norms and the input
table stay floats. Quantised by qwix, the extra "int8".
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError
from ssd_jax.core.extras import need
from ssd_jax.core.types import Params
from ssd_jax.runtime import sharding

# End of a matrix's path -> its dimensions that are summed over, from the back.
_SUMMED = {
    "attn/q": (-3,), "attn/k": (-3,), "attn/v": (-3,), "attn/o": (-3, -2),
    "mlp/gate": (-2,), "mlp/up": (-2,), "mlp/down": (-2,),
    "head": (-2,), "head_in": (-2,),
    "w0": (-2,), "w1": (-2,), "w2": (-2,), "w3": (-2,),
}


def quantize(params: Params) -> Params:
  """Parameters of trunk and spatial heads with their matrices in int8.

  Raises:
    UserError: when the extra is not installed, devices share the weights, or
      they are quantised already.
  """
  qwix = need("qwix", "int8")
  if sharding.num_param_shards() > 1:
    raise UserError(
        "Expected them whole on each, got int8 for weights that several "
        "devices share. Use --mesh data=N alone, or leave int8 out.")
  if is_quantized(params):
    raise UserError("Expected floats, got weights in int8. Quantise them "
                    "once.")

  @functools.partial(jax.jit, static_argnums=1)
  def pack(x, kept):
    return qwix.quantize(
        x, jnp.int8, channelwise_axes=kept, scale_dtype=jnp.float32)

  def visit(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for end, summed in _SUMMED.items():
      if f"/{name}".endswith(f"/{end}"):
        kept = set(range(x.ndim)) - {x.ndim + axis for axis in summed}
        return pack(x, tuple(sorted(kept)))
    return x

  return jax.tree_util.tree_map_with_path(visit, params)


def is_quantized(params: Params) -> bool:
  """Whether any of the parameters are in int8."""
  return any(map(_is_packed, jax.tree.leaves(params, is_leaf=_is_packed)))


def dequantize(params: Params) -> Params:
  """The parameters as floats; those that are stay as they are."""
  unpack = lambda x: (
      x.qvalue.astype(x.scale.dtype) * x.scale if _is_packed(x) else x)
  return jax.tree.map(unpack, params, is_leaf=_is_packed)


def dequantized(module: type[nn.Module]) -> type[nn.Module]:
  """A module like `module` that takes its parameters in int8."""
  return nn.map_variables(module, "params", dequantize)


def _is_packed(x: Any) -> bool:
  return hasattr(x, "qvalue")
