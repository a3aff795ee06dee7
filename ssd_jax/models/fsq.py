"""Finite scalar quantisation: a codebook that is computed, not stored.

A dimension of L levels has the values (digit - L // 2) / (L // 2); the first
dimension's digit is the lowest one of an index. B batch, R rows and C columns
of the grid, V codebook entries, Z dimensions.

Source: Mentzer et al. 2023, arXiv:2309.15505, section 3.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def codebook(levels: tuple[int, ...]) -> jax.Array:
  """Returns all entries, float32 [V, Z].

  Args:
    levels: Levels L of each dimension.
  """
  sizes = np.array(levels)
  index_V = jnp.arange(math.prod(levels))
  digits_VZ = index_V[:, None] // _basis(levels) % sizes
  half = sizes // 2
  return (digits_VZ - half) / half.astype(np.float32)


def quantize(z_BRCZ: jax.Array, levels: tuple[int, ...]) -> jax.Array:
  """Returns the index of each latent's entry.

  Each dimension is bounded by a tanh, shifted for even numbers of levels, and
  rounded; the margin of 0.1% is that of the published code.

  Args:
    z_BRCZ: Latents.
    levels: Levels of each dimension.

  Returns:
    int32 [B, R, C].
  """
  sizes = np.array(levels)
  reach = (sizes - 1) * 1.001 / 2
  offset = np.where(sizes % 2 == 0, 0.5, 0.0)
  shift = np.arctanh(offset / reach).astype(np.float32)
  bounded = jnp.tanh(z_BRCZ + shift) * reach.astype(np.float32)
  digits = jnp.round(bounded - offset.astype(np.float32)) + sizes // 2
  return jnp.sum(digits.astype(jnp.int32) * _basis(levels), axis=-1)


def _basis(levels: tuple[int, ...]) -> np.ndarray:
  return np.cumprod((1, *levels[:-1])).astype(np.int32)
