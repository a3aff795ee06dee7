"""The target distribution and its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.decoding import sampling
from ssd_jax.decoding.sampling import Sampling


def reference(logits, temperature, top_k, top_p):
  """Sorting, in float64: the definition that the bisection must match."""
  x = logits.astype(np.float64) / temperature
  if top_k:
    x = np.where(x < np.sort(x)[-min(top_k, len(x))], -np.inf, x)
  p = np.exp(x - x.max())
  p /= p.sum()
  if top_p < 1:
    order = np.argsort(-p, kind="stable")
    kept = int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-12)) + 1
    p = np.where(p >= p[order[kept - 1]], p, 0.0)
    p /= p.sum()
  return p


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.6),
                                         (1, 1.0), (500, 0.999)])
def test_target_equals_sorting(top_k, top_p):
  """Thresholds found by bisection keep what sorting keeps."""
  logits = np.asarray(3 * jax.random.normal(jax.random.key(0), (4, 100)))
  settings = Sampling.make(temperature=0.7, top_k=top_k, top_p=top_p)
  got = sampling.target(jnp.asarray(logits)[None], settings)
  want = np.stack([reference(row, 0.7, top_k, top_p) for row in logits])
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_top_k_keeps_ties():
  """Codes that tie with the k-th stay, as in the published samplers."""
  logits = jnp.array([1.0, 2.0, 2.0, 2.0, -1.0])
  kept = jnp.isfinite(sampling.keep_top_k(logits, jnp.int32(2)))
  np.testing.assert_array_equal(kept, [False, True, True, True, False])


def test_guidance_moves_away_from_the_unconditional_stream():
  """Logits are u + s (c - u), whatever the scale."""
  cond, uncond = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
  got = sampling.guide(jnp.stack([cond, uncond]), jnp.float32(4.0))
  np.testing.assert_allclose(got, uncond + 4.0 * (cond - uncond))


def test_sampling_follows_the_distribution():
  """Gumbel-max over position-keyed noise samples from p."""
  p = jnp.array([0.5, 0.3, 0.15, 0.05, 0.0])
  images = jnp.arange(20_000)
  draw = jax.vmap(lambda image: sampling.sample(
      p[None], sampling.token_noise(jax.random.key(1), image, jnp.array([3]), 5)
  )[0])
  counts = np.bincount(draw(images), minlength=5) / len(images)
  assert counts[4] == 0
  np.testing.assert_allclose(counts, p, atol=4 * np.sqrt(0.25 / len(images)))


@pytest.mark.parametrize("vocab", [1, 3, 8, 100])
def test_samples_by_inversion_follow_the_distribution(vocab):
  """Frequencies follow p, which need not sum to one; 0 is never sampled."""
  p_V = jax.random.dirichlet(jax.random.key(vocab), jnp.full(vocab, 0.5))
  p_V = jnp.where(jnp.arange(vocab) % 3 == 2, 0.0, 7 * p_V)
  keys = jax.random.split(jax.random.key(0), 50)
  draw = jax.vmap(
    lambda key: sampling.sample_inverse(jnp.tile(p_V, (2000, 1)), key)
  )
  counts_V = np.bincount(draw(keys).ravel(), minlength=vocab)
  expected_V = np.asarray(p_V / p_V.sum()) * counts_V.sum()
  assert not counts_V[expected_V == 0].any()
  error_V = np.abs(counts_V - expected_V)
  assert (error_V <= 5 * np.sqrt(expected_V)).all()


def test_no_rows_sample_nothing():
  """A grid of one column has no tokens to draft in a row."""
  assert sampling.sample_inverse(jnp.ones((0, 5)), jax.random.key(0)).shape == (
    0,
  )


@pytest.mark.parametrize("p", [0.0, np.nan])
def test_a_row_without_numbers_samples_a_token_that_exists(p):
  """Nothing to sample from gives the first token, not one out of range."""
  p_QV = jnp.full((2, 10), p)
  assert (sampling.sample_inverse(p_QV, jax.random.key(0)) == 0).all()
  noise_QV = jnp.zeros((2, 10))
  assert (sampling.sample(p_QV, noise_QV) < 10).all()


def test_rounding_never_samples_a_code_without_probability():
  """Levels at the very end of the running sums stay on codes with mass."""
  mass_QN = jnp.array([[0.25, 0.75, 0.0, 0.0], [0.0, 0.3, 0.0, 0.7]])
  for level in (0.0, 0.25, 0.99999994, 1.0, 2.0):
    place_Q, _ = sampling._invert(mass_QN, jnp.full(2, level))
    assert (jnp.take_along_axis(mass_QN, place_Q[:, None], 1) > 0).all()


def test_noise_is_keyed_by_image_and_slot_alone():
  """Whatever asks for a slot's noise, with whichever others, gets the same."""
  key = jax.random.key(5)
  one = sampling.token_noise(key, jnp.int32(2), jnp.array([7]), 11)
  many = sampling.token_noise(key, jnp.int32(2), jnp.array([1, 7, 3]), 11)
  other = sampling.token_noise(key, jnp.int32(3), jnp.array([7]), 11)
  np.testing.assert_array_equal(one[0], many[1])
  assert not np.array_equal(one, other)


def test_residual_of_equal_distributions_falls_back_to_the_target():
  """A draft distribution equal to the target leaves no residual; p itself is
  sampled."""
  p = jnp.array([0.2, 0.8])
  np.testing.assert_array_equal(sampling.residual(p, p), p)
  np.testing.assert_allclose(
      sampling.residual(p, jnp.array([0.5, 0.5])), [0.0, 0.3], atol=1e-6)
