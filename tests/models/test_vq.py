"""The tokenizer module and what its training promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.models import codebook_search, vq as vq_lib
from ssd_jax.models.vq import VQ, VQConfig

CFG = VQConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, n_codes=32,
               code_dim=4, l2_norm=False, attn_levels=(1,), patch=2, groups=4)


@pytest.fixture(scope="module")
def params():
  return jax.jit(VQ(CFG).init)(
      jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]


def apply(params, x, method):
  return VQ(CFG).apply({"params": params}, x, method=method)


@pytest.mark.slow
def test_shapes(params):
  """Pixels -> latents -> ids -> pixels, `downsample` pixels per token."""
  image = jnp.zeros((2, 16, 24, 3))
  z = apply(params, image, "encode")
  chex.assert_shape(z, (2, 4, 6, CFG.code_dim))
  ids = apply(params, z, "quantize")
  chex.assert_shape(ids, (2, 4, 6))
  chex.assert_type(ids, jnp.int32)
  chex.assert_shape(apply(params, ids, "decode"), (2, 16, 24, 3))
  assert CFG.downsample == 4


@pytest.mark.parametrize("l2_norm", [False, True])
def test_nearest_code_is_the_nearest(l2_norm):
  """Ids are those of an exhaustive search by distance (or by cosine)."""
  rng = np.random.default_rng(0)
  z, codes = rng.normal(size=(2, 3, 3, 4)), rng.normal(size=(10, 4))
  if l2_norm:
    codes /= np.linalg.norm(codes, axis=-1, keepdims=True)
    want = (z @ codes.T / np.linalg.norm(z, axis=-1, keepdims=True)).argmax(-1)
  else:
    want = ((z[..., None, :] - codes) ** 2).sum(-1).argmin(-1)
  got = codebook_search.nearest_code(jnp.asarray(z), jnp.asarray(codes))
  np.testing.assert_array_equal(got, want)


def test_patches_fold_and_unfold():
  """The patch stem loses no pixel."""
  x = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
  folded = vq_lib._space_to_depth(x, 4)
  chex.assert_shape(folded, (2, 2, 3, 48))
  np.testing.assert_array_equal(vq_lib._depth_to_space(folded, 4), x)


def test_a_price_decides_between_codes_that_serve_alike():
  """Of two codes about as near, the cheaper one is looked up."""
  codes = jnp.array([[0.0, 0.0], [1.0, 0.0]])
  z = jnp.array([[[[0.6, 0.0], [0.9, 0.0]]]])
  assert codebook_search.nearest_code(z, codes).tolist() == [[[1, 1]]]
  price = jnp.array([0.0, 0.5])
  assert codebook_search.nearest_code(z, codes, price).tolist() == [[[0, 1]]]


def test_a_large_codebook_is_searched_row_by_row(monkeypatch):
  """By dot products and by distances, the same entries in less memory."""
  z = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
  codes = jax.random.normal(jax.random.key(1), (32, 4))
  for find in (codebook_search.best_code, codebook_search.nearest_code):
    find = functools.partial(find, codes_VZ=codes)
    monkeypatch.setattr(codebook_search, "MOST_DISTANCES", 2**20)
    whole = codebook_search.in_rows(find, z, 32)
    monkeypatch.setattr(codebook_search, "MOST_DISTANCES", 64)
    np.testing.assert_array_equal(codebook_search.in_rows(find, z, 32), whole)
  best = np.argmax(np.einsum("brcz,vz->brcv", z, codes), -1)
  np.testing.assert_array_equal(codebook_search.best_code(z, codes), best)
