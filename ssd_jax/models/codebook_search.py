"""The search of a codebook for latents.

B batch, R rows and C columns of the grid, V codebook entries, Z codebook
dimension.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

MOST_DISTANCES = 2**27  # of latents to entries, held at a time


def unit(x: jax.Array) -> jax.Array:
  """Scales vectors to unit length along the last axis."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest_code(
    z_BRCZ: jax.Array, codes_VZ: jax.Array, price_V: jax.Array | float = 0.0
) -> jax.Array:
  """Finds the codebook entry with the least squared distance plus price.

  On a unit-norm codebook this is the entry with the largest cosine, whatever
  the latent's length, so the latents need no normalisation.

  Args:
    z_BRCZ: Latents.
    codes_VZ: Codebook.
    price_V: Price of each entry.

  Returns:
    int32 [B, R, C], indices of codebook entries.
  """
  dots = _dots(z_BRCZ, codes_VZ)
  distance = jnp.sum(codes_VZ**2, axis=-1) + price_V - 2.0 * dots
  return jnp.argmin(distance, axis=-1).astype(jnp.int32)


def best_code(z_BRCZ: jax.Array, codes_VZ: jax.Array) -> jax.Array:
  """Returns the entry of the largest dot product, int32 [B, R, C] (IBQ)."""
  return jnp.argmax(_dots(z_BRCZ, codes_VZ), axis=-1).astype(jnp.int32)


def in_rows(
    find: Callable[[jax.Array], jax.Array], z_BRCZ: jax.Array, count: int
) -> jax.Array:
  """Searches the codebook for all latents, row by row if it is large.

  Args:
    find: Function from latents to entries.
    z_BRCZ: Latents.
    count: Number of entries.

  Returns:
    int32 [B, R, C].
  """
  if z_BRCZ[..., 0].size * count <= MOST_DISTANCES:
    return find(z_BRCZ)
  rows = jax.lax.map(find, jnp.moveaxis(z_BRCZ, 1, 0)[:, :, None])
  return jnp.moveaxis(rows[:, :, 0], 0, 1)


def _dots(z_BRCZ: jax.Array, codes_VZ: jax.Array) -> jax.Array:
  return jnp.einsum("brcz,vz->brcv", z_BRCZ, codes_VZ)
