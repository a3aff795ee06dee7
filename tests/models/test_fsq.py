"""Finite scalar quantisation against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np

from ssd_jax.models import fsq

_LEVELS = (8, 5)


def test_codebook():
  """The first dimension varies fastest; even levels lack the upper end."""
  codes = np.asarray(fsq.codebook(_LEVELS))
  assert codes.shape == (40, 2)
  np.testing.assert_array_equal(codes[:8, 0], np.arange(-4, 4) / 4)
  np.testing.assert_array_equal(codes[::8, 1], [-1, -0.5, 0, 0.5, 1])
  assert (codes[:8, 1] == -1).all()


def test_codes_are_fixed_points():
  """Latents whose bounded value is an entry get its index; far ones the
  ends."""
  digits = np.stack(np.meshgrid(np.arange(8), np.arange(5)), -1).reshape(-1, 2)
  reach, offset = np.array([7, 4]) * 1.001 / 2, np.array([0.5, 0])
  inside = (digits - [4, 2] + offset) / reach
  latents = np.arctanh(inside) - np.arctanh(offset / reach)
  index = fsq.quantize(jnp.asarray(latents)[None, None], _LEVELS)
  np.testing.assert_array_equal(index[0, 0], digits @ [1, 8])
  ends = fsq.quantize(jnp.array([[[[-99.0, -99.0], [99.0, 99.0]]]]), _LEVELS)
  assert ends.ravel().tolist() == [0, 39]
