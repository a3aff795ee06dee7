"""Acceptance rules: pure functions of the target, the drafts and the noise.

A draft is tested against the target p of its slot, using the distribution q
that it was sampled from. The output follows the target distribution only if the
noise of a test, and of the resampling that follows a rejection, is fresh:
independent of the noise that the draft was sampled with and of the noise of
every other pass.
"""

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.decoding import sampling


@flax.struct.dataclass
class Drafts:
  """Proposed tokens and the distributions that they were sampled from.

  Attributes:
    tokens: int32 [Q].
    q: float32 [Q, V], draft distributions; not read where `is_point`.
    is_point: bool [Q], whether q is the point mass at the draft, i.e. the draft
      was chosen deterministically instead of sampled.
  """

  tokens: jax.Array
  q: jax.Array
  is_point: jax.Array


def at(p_QV: jax.Array, tokens_Q: jax.Array) -> jax.Array:
  """Returns each row's entry at its token, float32 [Q]."""
  return jnp.take_along_axis(p_QV, tokens_Q[:, None], axis=-1)[:, 0]


def accept_exact(
    p_QV: jax.Array, drafts: Drafts, u_Q: jax.Array,
    lenience_Q: jax.Array | float = 1.0,
) -> jax.Array:
  """Accepts each draft with probability min(1, p / q).

  Args:
    p_QV: Target distributions.
    drafts: Drafts of the same slots.
    u_Q: Uniform samples from [0, 1).
    lenience_Q: Factor that q is multiplied by; values below 1 accept more
      drafts (appendix A.5).

  Returns:
    bool [Q], which drafts are accepted.

  Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1.
  """
  q_Q = jnp.where(drafts.is_point, 1.0, at(drafts.q, drafts.tokens))
  return lenience_Q * u_Q * q_Q < at(p_QV, drafts.tokens)


def residual(p_QV: jax.Array, drafts: Drafts) -> jax.Array:
  """Returns the residual distribution that a rejected draft is resampled from.

  Args:
    p_QV: Target distributions.
    drafts: Drafts of the same slots.

  Returns:
    float32 [Q, V], unnormalised.
  """
  return sampling.residual(p_QV, _draft_distribution(p_QV, drafts))


def lenient_distribution(
    p_QV: jax.Array, drafts: Drafts, lenience_Q: jax.Array
) -> jax.Array:
  """Returns the distribution of a token after a lenient test and resampling.

  Each entry is at most p / lenience, whatever q is; with a lenience of 1 the
  result is p.

  Args:
    p_QV: Target distributions.
    drafts: Drafts of the same slots.
    lenience_Q: Factor that q is multiplied by in the test.

  Returns:
    float32 [Q, V].
  """
  q_QV = _draft_distribution(p_QV, drafts)
  kept_QV = jnp.minimum(q_QV, p_QV / lenience_Q[:, None])
  left_QV = jnp.maximum(p_QV - q_QV, 0.0)
  share_Q = (1.0 - jnp.sum(kept_QV, axis=-1)) / jnp.maximum(
      jnp.sum(left_QV, axis=-1), 1e-30)
  return kept_QV + jnp.clip(share_Q, 0.0, 1.0)[:, None] * left_QV


def _draft_distribution(p_QV: jax.Array, drafts: Drafts) -> jax.Array:
  is_draft_QV = jnp.arange(p_QV.shape[-1]) == drafts.tokens[:, None]
  return jnp.where(drafts.is_point[:, None], is_draft_QV, drafts.q)


def count_prefix(accept_Q: jax.Array) -> jax.Array:
  """Returns the length of the accepted prefix, int32 []."""
  return jnp.sum(jnp.cumprod(accept_Q.astype(jnp.int32)))


def rank_neighbours(
    p_QV: jax.Array, tokens_Q: jax.Array, group: int
) -> tuple[jax.Array, jax.Array]:
  """Finds the tokens whose rank under p is closest to that of each draft.

  Ties in probability are broken by token id.

  Args:
    p_QV: Target distributions.
    tokens_Q: Drafts.
    group: Number of tokens per draft, the draft included.

  Returns:
    Token ids, int32 [Q, group]: the draft itself first, then the group / 2
    tokens ranked just below it, then those just above it. And bool [Q, group],
    which of these exist: fewer do near either end of the ranking.
  """
  ids_V = jnp.arange(p_QV.shape[-1])
  own_Q1 = at(p_QV, tokens_Q)[:, None]
  is_tie_QV = p_QV == own_Q1
  is_low_QV = ids_V < tokens_Q[:, None]
  is_high_QV = ids_V > tokens_Q[:, None]
  below = (p_QV < own_Q1) | (is_tie_QV & is_low_QV)
  above = (p_QV > own_Q1) | (is_tie_QV & is_high_QV)
  low, low_ids = jax.lax.top_k(jnp.where(below, p_QV, -jnp.inf), group // 2)
  high, high_ids = jax.lax.top_k(
      jnp.where(above, -p_QV, -jnp.inf), group - group // 2 - 1
  )
  ids = jnp.concatenate([tokens_Q[:, None], low_ids, high_ids], axis=-1)
  exists = jnp.concatenate(
      [jnp.ones_like(own_Q1, bool), jnp.isfinite(low), jnp.isfinite(high)],
      axis=-1,
  )
  return ids, exists


def accept_group(
    p_QV: jax.Array, drafts: Drafts, u_Q: jax.Array, members_QG: jax.Array,
    is_member_QG: jax.Array,
) -> jax.Array:
  """Accepts each draft with probability min(1, sum p / sum q) over its cluster.

  A draft that the target's filters exclude is never accepted, however probable
  its neighbours are. For a cluster of one token this is `accept_exact`.

  Args:
    p_QV: Target distributions.
    drafts: Drafts of the same slots.
    u_Q: Uniform samples from [0, 1).
    members_QG: Token ids of each draft's cluster.
    is_member_QG: Which of these ids belong to the cluster; the draft must.

  Returns:
    bool [Q], which drafts are accepted.

  Source: So et al. 2025, arXiv:2508.07747.
  """
  take = lambda x_QV: jnp.take_along_axis(x_QV, members_QG, axis=-1)
  total = lambda x_QG: jnp.sum(jnp.where(is_member_QG, x_QG, 0.0), axis=-1)
  q_Q = jnp.where(drafts.is_point, 1.0, total(take(drafts.q)))
  is_possible_Q = at(p_QV, drafts.tokens) > 0.0
  return is_possible_Q & (u_Q * q_Q < total(take(p_QV)))
