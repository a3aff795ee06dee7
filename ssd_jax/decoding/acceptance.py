"""Acceptance rules: pure functions of the target, the drafts and the noise.

A draft is tested against the target p of its slot by the distribution q that it
was really drawn from. For the law of the output to be the target's, the noise
of a test and of the draw that corrects it must be fresh: independent of the
noise that the draft was drawn with, and of that of every other pass.
"""

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.decoding import sampling


@flax.struct.dataclass
class Drafts:
  """Proposed tokens and the distributions they were drawn from.

  Attributes:
    tokens: int32 [Q].
    q: float32 [Q, V]; not read where `is_point`.
    is_point: bool [Q], the draft was not drawn but given: q is one at it.
  """

  tokens: jax.Array
  q: jax.Array
  is_point: jax.Array


def at(p_QV: jax.Array, tokens_Q: jax.Array) -> jax.Array:
  """float32 [Q]: each row's entry at its token."""
  return jnp.take_along_axis(p_QV, tokens_Q[:, None], axis=-1)[:, 0]


def accept_exact(
    p_QV: jax.Array, drafts: Drafts, u_Q: jax.Array,
    lenience_Q: jax.Array | float = 1.0,
) -> jax.Array:
  """bool [Q]: whether each draft passes with probability min(1, p / q).

  Args:
    p_QV: Targets.
    drafts: Of the same slots.
    u_Q: Uniform draws in [0, 1).
    lenience_Q: What q is multiplied by; below 1 more pass (appendix A.5).

  Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1.
  """
  q_Q = jnp.where(drafts.is_point, 1.0, at(drafts.q, drafts.tokens))
  return lenience_Q * u_Q * q_Q < at(p_QV, drafts.tokens)


def residual(p_QV: jax.Array, drafts: Drafts) -> jax.Array:
  """float32 [Q, V], not normalised: what a rejected draft is redrawn from."""
  return sampling.residual(p_QV, _drawn_from(p_QV, drafts))


def lenient_distribution(
    p_QV: jax.Array, drafts: Drafts, lenience_Q: jax.Array
) -> jax.Array:
  """float32 [Q, V]: what tokens are drawn from by a lenient test and redraw.

  At most p / lenience, entry by entry, whatever q was; p where lenience is 1.
  """
  q_QV = _drawn_from(p_QV, drafts)
  kept_QV = jnp.minimum(q_QV, p_QV / lenience_Q[:, None])
  left_QV = jnp.maximum(p_QV - q_QV, 0.0)
  share_Q = (1.0 - jnp.sum(kept_QV, axis=-1)) / jnp.maximum(
      jnp.sum(left_QV, axis=-1), 1e-30)
  return kept_QV + jnp.clip(share_Q, 0.0, 1.0)[:, None] * left_QV


def _drawn_from(p_QV: jax.Array, drafts: Drafts) -> jax.Array:
  is_draft_QV = jnp.arange(p_QV.shape[-1]) == drafts.tokens[:, None]
  return jnp.where(drafts.is_point[:, None], is_draft_QV, drafts.q)


def count_prefix(accept_Q: jax.Array) -> jax.Array:
  """int32 []: accepted drafts before the first rejected one."""
  return jnp.sum(jnp.cumprod(accept_Q.astype(jnp.int32)))


def rank_neighbours(
    p_QV: jax.Array, tokens_Q: jax.Array, group: int
) -> tuple[jax.Array, jax.Array]:
  """(int32 [Q, group], bool [Q, group]): tokens close in rank, which exist.

  With all tokens sorted by p, these are the token itself (first), the group / 2
  just below it and the rest just above; near an end of the ranking fewer exist.
  Equal probabilities are ranked by their ids.
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
  """bool [Q]: whether each draft's cluster passes with min(1, sum p / sum q).

  A draft that the target's filters exclude never passes, however probable its
  neighbours are. With the draft alone in its cluster this is `accept_exact`.

  Args:
    p_QV: Targets.
    drafts: Of the same slots.
    u_Q: Uniform draws in [0, 1).
    members_QG: Token ids of each draft's cluster.
    is_member_QG: Which of them count; the draft must.

  Source: So et al. 2025, arXiv:2508.07747.
  """
  take = lambda x_QV: jnp.take_along_axis(x_QV, members_QG, axis=-1)
  total = lambda x_QG: jnp.sum(jnp.where(is_member_QG, x_QG, 0.0), axis=-1)
  q_Q = jnp.where(drafts.is_point, 1.0, total(take(drafts.q)))
  is_possible_Q = at(p_QV, drafts.tokens) > 0.0
  return is_possible_Q & (u_Q * q_Q < total(take(p_QV)))
