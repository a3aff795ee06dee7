"""Norms of the trunk, with statistics in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
  """Root-mean-square norm with statistics in float32.

  Attributes:
    eps: Added to the mean square.
    offset: Whether the scale is stored as its difference from 1; it is then
      added and multiplied in float32, as a sum in bfloat16 would lose it.
  """

  eps: float
  offset: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the input's shape and dtype."""
    init = nn.initializers.zeros if self.offset else nn.initializers.ones
    scale = self.param("scale", init, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.eps)
    if self.offset:
      return (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * scale.astype(x.dtype)


class HeadNorm(nn.Module):
  """LayerNorm over the head dimension with scale and bias per head."""

  @nn.compact
  def __call__(self, x_SQNH: jax.Array) -> jax.Array:
    """Returns an array of the input's shape and dtype."""
    shape = x_SQNH.shape[-2:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    x = x_SQNH.astype(jnp.float32)
    x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    return (x * scale + bias).astype(x_SQNH.dtype)
