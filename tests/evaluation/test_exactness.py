"""The exactness test: it clears exact samplers and catches biased ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.decoding import acceptance, engine
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.jacobi.sjd import SJD
from ssd_jax.evaluation import exactness
from ssd_jax.evaluation.exactness import Finding
from ssd_jax.pipeline import testing

DRAWS = 20_000


@functools.cache
def tiny():
  return testing.tiny(vocab=3, rows=2, cols=3, heads=(0, 0), seed=1)


@functools.cache
def distribution():
  return exactness.enumerate_distribution(tiny())[1]


@dataclasses.dataclass(frozen=True)
class LockStep(SJD):
  """SJD as published for batches: all images commit what the slowest can.

  Drafts that passed beyond that are tested once more in the next pass, by the
  distribution they were sampled from: they pass twice or not at all.
  """

  name = "lockstep"

  def _test(self, ctx, slots_Q, p_QV, drafts, is_tested_Q):
    accepted_Q, tokens_Q = super()._test(
        ctx, slots_Q, p_QV, drafts, is_tested_Q)
    least = jax.lax.pmin(acceptance.count_prefix(accepted_Q), "images")
    return accepted_Q & (jnp.arange(len(accepted_Q)) < least), tokens_Q

  def resolve(self, ctx, state, queries, p_QV, hidden_GQD):
    after = super().resolve(ctx, state, queries, p_QV, hidden_GQD)
    slots_D = state.next + jnp.arange(len(state.q))
    last = ctx.model.grid.length - 1
    drafts = Drafts(
        state.tokens[jnp.minimum(slots_D, last)], state.q, state.is_point)
    u_D = jax.random.uniform(ctx.pass_key(0), slots_D.shape)
    accepted_D = acceptance.accept_exact(p_QV[:-1], drafts, u_D)
    is_prefix_D = jnp.cumprod(accepted_D.astype(jnp.int32)) > 0
    rows_D = after.next - state.next + jnp.arange(len(state.q))
    kept_D = is_prefix_D.at[rows_D].get(mode="fill", fill_value=False)
    old_DV = state.q[jnp.minimum(rows_D, len(state.q) - 1)]
    return after.replace(q=jnp.where(kept_D[:, None], old_DV, after.q))


@pytest.fixture
def images_in_touch(monkeypatch):
  """Lets the images of a batch see each other, which the engine prevents."""
  def over(model, function):
    axes = engine.image_axes(model)

    def call(ctx, *args):
      return jax.vmap(function, in_axes=(axes, *(0 for _ in args)),
                      axis_name="images")(ctx, *args)

    return call

  monkeypatch.setattr(engine, "_over_images", over)


def test_ar_is_cleared():
  """AR's samples follow the distribution it defines; its noise is at the
  floor."""
  found = exactness.examine(tiny(), AR(), "ar", DRAWS, group=4)
  assert found.verdict == "exact" and found.is_sound
  assert found.tv == pytest.approx(found.floor, rel=0.2)
  assert found.draws == DRAWS and found.passes == 6


@pytest.mark.slow
@pytest.mark.parametrize("group", exactness.GROUPS)
def test_planted_bias_is_caught(images_in_touch, group):
  """Committing the batch's minimum is exact alone and biased in company."""
  found = exactness.examine(tiny(), LockStep(4), "lockstep", DRAWS, group)
  assert found.lossless
  if group == 1:
    assert found.verdict == "exact" and found.is_sound
  else:
    assert found.verdict == "BIASED" and not found.is_sound
    assert found.p_value < 1e-9 and found.tv > 1.5 * found.floor


def test_enumerated_probabilities_sum_to_one():
  """All images are enumerated, each once; their probabilities sum to one."""
  images, p_I = exactness.enumerate_distribution(tiny())
  assert images.shape == (729, 2, 3) and p_I.sum() == pytest.approx(1)
  np.testing.assert_array_equal(
      exactness.count(tiny(), images), np.ones(729))


def test_statistics_of_exact_samples():
  """P-values are uniform and distances lie at the floor for exact samples."""
  rng = np.random.default_rng(0)
  counts = rng.multinomial(5000, distribution(), 200)
  p_values = np.array([exactness.chi_square(c, distribution()) for c in counts])
  tvs = [exactness.total_variation(c, distribution()) for c in counts]
  assert 0.4 < p_values.mean() < 0.6 and (p_values < 0.1).mean() < 0.2
  assert np.mean(tvs) == pytest.approx(
      exactness.noise_floor(distribution(), 5000), rel=0.02)


def test_bias_of_the_stated_size_is_found_as_often_as_stated():
  """About 9 in 10 samples with a bias of `detectable` size are called
  biased."""
  rng = np.random.default_rng(1)
  size = exactness.detectable(distribution(), DRAWS)
  found = []
  for _ in range(30):
    p_I = distribution() * (
      1 + 2 * size * rng.choice([-1, 1], len(distribution()))
    )
    counts = rng.multinomial(DRAWS, p_I / p_I.sum(), 10)
    found += [exactness.chi_square(c, distribution()) < exactness.P_VALUE
              for c in counts]
  assert 0.75 < np.mean(found) < 0.97


def test_an_impossible_image_ends_the_doubt():
  """One sample of what cannot be sampled is enough."""
  p_I = np.array([0.5, 0.5, 0.0])
  assert exactness.chi_square(np.array([500, 499, 1]), p_I) == 0.0
  assert exactness.chi_square(np.array([500, 500, 0]), p_I) > 0.9


def test_pooling_loses_nothing():
  """Every bin expects enough, no count and no probability is lost."""
  counts = np.arange(50)
  expected = np.concatenate([np.full(40, 0.3), np.linspace(1, 100, 10)])
  found, wanted = exactness.pool(counts, expected)
  assert wanted.min() >= exactness.LEAST_EXPECTED
  assert found.sum() == counts.sum()
  assert wanted.sum() == pytest.approx(expected.sum())
  one = exactness.pool(np.array([1, 2]), np.array([0.1, 0.2]))
  np.testing.assert_allclose(one, [[3], [0.3]])


@pytest.mark.parametrize("lossless,p_value,verdict,is_sound", [
    (True, 0.5, "exact", True), (True, 1e-4, "BIASED", False),
    (False, 1e-9, "relaxed", True), (False, 0.5, "not distinguishable", True),
])
def test_verdicts(lossless, p_value, verdict, is_sound):
  """Only a claim of exactness can be broken."""
  found = Finding("d", lossless, 4, 100, 0.1, 0.1, p_value, 3.0)
  assert found.verdict == verdict and found.is_sound == is_sound
  assert f"| {verdict} |" in exactness.table([found])
