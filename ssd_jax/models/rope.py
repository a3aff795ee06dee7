"""Rotary position tables and their application (Su et al. 2021).

A table has one row per position; each slot of a sequence has the index of its
row, so the trunk treats one- and two-dimensional schemes alike.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.config import check


def frequencies(dim: int, theta: float) -> np.ndarray:
  """Returns the radians per position of each pair, float64 [dim / 2]."""
  check(0 < theta < np.inf, "theta", theta, "a number > 0")
  return 1.0 / theta ** (np.arange(0, dim, 2) / dim)


def table_1d(positions: int, head_dim: int, theta: float) -> np.ndarray:
  """Returns the cosine and sine of each pair for consecutive positions.

  Args:
    positions: Number of positions.
    head_dim: Head dimension H.
    theta: Base of the frequencies.

  Returns:
    float32 [positions, head_dim / 2, 2].
  """
  angles = np.arange(positions)[:, None] * frequencies(head_dim, theta)
  return _cos_sin(angles)


def table_2d(row_col: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
  """Returns the cosine and sine of each pair for two-dimensional positions.

  The first half of the pairs encodes the row, the second half the column
  (LlamaGen, Sun et al. 2024).

  Args:
    row_col: Row and column of each position, [positions, 2].
    head_dim: Head dimension H.
    theta: Base of the frequencies.

  Returns:
    float32 [positions, head_dim / 2, 2].
  """
  freq = frequencies(head_dim // 2, theta)
  angles = np.concatenate(
      [row_col[:, :1] * freq, row_col[:, 1:] * freq], axis=-1
  )
  return _cos_sin(angles)


def table_axes(
    places: np.ndarray, head_dim: int, theta: float, sections: Sequence[int]
) -> np.ndarray:
  """Returns the cosine and sine of each pair for places of several axes.

  The first pairs read the first axis, the next ones the second and so on
  (M-RoPE, Wang et al. 2024, arXiv:2409.12191); the rest do not rotate.

  Args:
    places: Coordinates of each position, [positions, axes]; may be negative,
      as only differences matter.
    head_dim: Head dimension H.
    theta: Base of the frequencies.
    sections: Number of pairs that read each axis; at most H / 2 in all.

  Returns:
    float32 [positions, head_dim / 2, 2].
  """
  count = sum(sections)
  check(count <= head_dim // 2, "sections", sections,
        f"at most {head_dim // 2} pairs in all")
  axis = np.repeat(np.arange(len(sections)), sections)
  angles = np.zeros((len(places), head_dim // 2))
  angles[:, :count] = places[:, axis] * frequencies(2 * count, theta)
  return _cos_sin(angles)


def rotate(
    x_SQNH: jax.Array, cos_sin_SQh2: jax.Array, interleaved: bool
) -> jax.Array:
  """Rotates each pair of the last axis in float32 and casts back.

  Args:
    x_SQNH: Queries or keys.
    cos_sin_SQh2: Rows of a table, h = H / 2.
    interleaved: Whether pairs are (2j, 2j + 1) instead of (j, j + H / 2).
  """
  cos = cos_sin_SQh2[..., None, :, 0]
  sin = cos_sin_SQh2[..., None, :, 1]
  x = x_SQNH.astype(jnp.float32)
  if interleaved:
    a, b = x[..., 0::2], x[..., 1::2]
    y = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    y = y.reshape(x.shape)
  else:
    a, b = jnp.split(x, 2, axis=-1)
    y = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return y.astype(x_SQNH.dtype)


def _cos_sin(angles: np.ndarray) -> np.ndarray:
  return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
