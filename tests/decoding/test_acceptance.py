"""Acceptance rules, against distributions computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.decoding import acceptance
from ssd_jax.decoding.acceptance import Drafts

VOCAB = 6


def distributions(seed, zeros=1):
  """float32 [2, V]: two random distributions with some impossible tokens."""
  rng = np.random.default_rng(seed)
  p = rng.dirichlet(np.full(VOCAB, 0.7), 2)
  for row in p:
    row[rng.choice(VOCAB, zeros, replace=False)] = 0.0
  return jnp.asarray(p / p.sum(-1, keepdims=True), jnp.float32)


def probability(rule, p_V, q_V, token, is_point=False, grid=4000):
  """The share of evenly spread uniforms at which the draft passes."""
  u_Q = (jnp.arange(grid) + 0.5) / grid
  p_QV, q_QV = (jnp.broadcast_to(x, (grid, VOCAB)) for x in (p_V, q_V))
  drafts = Drafts(jnp.full(grid, token), q_QV, jnp.full(grid, is_point))
  return float(jnp.mean(rule(p_QV, drafts, u_Q)))


def corrected(p_V, q_V, token, is_point=False):
  """The normalised distribution that a rejected draft is resampled from."""
  drafts = Drafts(
      jnp.array([token]), q_V[None], jnp.array([is_point])
  )
  dist_V = np.asarray(acceptance.residual(p_V[None], drafts))[0]
  return dist_V / dist_V.sum()


@pytest.mark.parametrize("seed", range(4))
def test_sampled_drafts_end_as_target(seed):
  """Test and residual sample together turn the draft's distribution into the
  target's."""
  p_V, q_V = distributions(seed)
  distribution = np.zeros(VOCAB)
  for token in range(VOCAB):
    passes = probability(acceptance.accept_exact, p_V, q_V, token)
    weight = float(q_V[token])
    distribution[token] += weight * passes
    distribution += weight * (1 - passes) * corrected(p_V, q_V, token)
  np.testing.assert_allclose(distribution, p_V, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_lenient_drafts_end_as_their_distribution(seed):
  """Accepting and resampling give `lenient_distribution`, at most p / l."""
  p_V, q_V = distributions(seed)
  rule = lambda *args: acceptance.accept_exact(*args, lenience_Q=0.4)
  distribution = np.zeros(VOCAB)
  for token in range(VOCAB):
    passes = probability(rule, p_V, q_V, token)
    weight = float(q_V[token])
    distribution[token] += weight * passes
    distribution += weight * (1 - passes) * corrected(p_V, q_V, token)
  drafts = Drafts(jnp.array([0]), q_V[None], jnp.array([False]))
  found = lambda l: acceptance.lenient_distribution(
      p_V[None], drafts, jnp.array([l]))[0]
  np.testing.assert_allclose(found(0.4), distribution, atol=1e-3)
  assert (found(0.4) <= p_V / 0.4 + 1e-6).all()
  np.testing.assert_allclose(found(1.0), p_V, atol=1e-6)


@pytest.mark.parametrize("token", range(VOCAB))
def test_given_drafts_end_as_target(token):
  """A draft that was given, not sampled, is tested by a q of one at it."""
  p_V, q_V = distributions(7)
  passes = probability(acceptance.accept_exact, p_V, q_V, token, True)
  distribution = (1 - passes) * corrected(p_V, q_V, token, True)
  distribution[token] += passes
  np.testing.assert_allclose(distribution, p_V, atol=1e-3)


def test_residual_falls_back_to_target():
  """Where draft and target agree, rounding leaves a distribution to sample
  from."""
  p_V = distributions(0)[0]
  np.testing.assert_allclose(corrected(p_V, p_V, 2), p_V, rtol=1e-6)


def test_prefix_ends_at_first_rejection():
  """Only drafts before the first rejected one count."""
  for accept, count in (([1, 1, 0, 1], 2), ([0, 1, 1], 0), ([1, 1], 2)):
    assert acceptance.count_prefix(jnp.array(accept, bool)) == count


@pytest.mark.parametrize("group", [1, 2, 4, 5, VOCAB])
def test_neighbours_are_ranks_around_the_draft(group):
  """Clusters hold group // 2 tokens below in rank, the rest above."""
  p_QV = jax.random.permutation(
      jax.random.key(group), jnp.arange(VOCAB, dtype=jnp.float32)
  )[None].repeat(VOCAB, 0)
  tokens_Q = jnp.arange(VOCAB)
  ids, exists = acceptance.rank_neighbours(p_QV, tokens_Q, group)
  order = np.argsort(np.asarray(p_QV[0])).tolist()
  for token in range(VOCAB):
    low = order.index(token) - group // 2
    near = order[max(low, 0):low + group]
    assert ids[token, 0] == token
    assert sorted(np.asarray(ids[token])[np.asarray(exists[token])].tolist()
                  ) == sorted(near)


def test_neighbours_of_equals_are_distinct():
  """Ties in probability do not put a token into its cluster twice."""
  p_QV = jnp.zeros((VOCAB, VOCAB)).at[:, 0].set(1.0)
  ids, exists = acceptance.rank_neighbours(p_QV, jnp.arange(VOCAB), VOCAB)
  for row, there in zip(np.asarray(ids), np.asarray(exists), strict=True):
    assert len(set(row[there])) == there.sum()


def group_rule(members, is_member):
  """accept_group with one cluster for all drafts."""
  def rule(p_QV, drafts, u_Q):
    spread = (jnp.broadcast_to(jnp.array(x), (len(u_Q), len(x)))
              for x in (members, is_member))
    return acceptance.accept_group(p_QV, drafts, u_Q, *spread)
  return rule


@pytest.mark.parametrize("is_point", [False, True])
def test_cluster_passes_by_its_sums(is_point):
  """A cluster passes with min(1, sum p / sum q) over its members alone."""
  p_V = jnp.array([0.1, 0.1, 0.3, 0.5, 0.0, 0.0])
  q_V = jnp.array([0.4, 0.2, 0.4, 0.0, 0.0, 0.0])
  rule = group_rule([0, 1, 3], [True, True, False])
  expected = 0.2 / (1.0 if is_point else 0.6)
  assert probability(rule, p_V, q_V, 0, is_point) == pytest.approx(
      expected, abs=1e-3)


def test_cluster_of_one_is_the_exact_test():
  """A draft alone in its cluster passes exactly as without one."""
  p_V, q_V = distributions(3)
  for token in range(VOCAB):
    alone = group_rule([token, (token + 1) % VOCAB], [True, False])
    assert probability(alone, p_V, q_V, token) == probability(
        acceptance.accept_exact, p_V, q_V, token)


def test_excluded_draft_never_passes_with_its_cluster():
  """A token the target's filters exclude is not let in by its neighbours."""
  p_V = jnp.array([0.0, 0.5, 0.5, 0.0, 0.0, 0.0])
  q_V = jnp.full(VOCAB, 1 / VOCAB)
  rule = group_rule([0, 1, 2], [True, True, True])
  assert probability(rule, p_V, q_V, 0) == 0.0
