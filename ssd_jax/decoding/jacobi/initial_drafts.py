"""Initial drafts of slots that no pass has predicted yet.

The output follows the target distribution as long as each draft is tested with
the distribution q that it was sampled from: uniform for random drafts, the
neighbour's stored distribution for samples of it, and a point mass for copies
of a neighbour or of the preview.

Source: Teng et al. 2024, arXiv:2410.01699, section 4.3 (its random, repeated
and sampled initialisations from the left and from above).
"""

import jax
import jax.numpy as jnp

from ssd_jax.core.grid import Grid
from ssd_jax.decoding import sampling
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context, given_drafts

INITS = (
    "random", "repeat_left", "repeat_above", "sample_left", "sample_above",
    "preview",
)
_RANDOM_PURPOSE, _SAMPLE_PURPOSE = 100, 101


def draft_first(
    ctx: Context, init: str, slots_Q: jax.Array, last: jax.Array,
    tokens_N: jax.Array, q_QV: jax.Array,
) -> Drafts:
  """Drafts slots beyond `last`; random where nothing else is known.

  Args:
    ctx: Context of the pass.
    init: One of INITS.
    slots_Q: Slots to draft, beyond `last`. Drafts of other slots are
      meaningless.
    last: int32 [], the last slot that holds a token or draft.
    tokens_N: Tokens and drafts.
    q_QV: Distributions to sample from, if `init` samples.

  Returns:
    One draft per slot.
  """
  size, vocab = slots_Q.shape[0], ctx.model.vocab
  random_Q = jax.random.randint(
      ctx.pass_key(_RANDOM_PURPOSE), (size,), 0, vocab
  )
  if init == "random":
    uniform_QV = jnp.full((size, vocab), 1.0 / vocab)
    return Drafts(random_Q, uniform_QV, jnp.zeros(size, bool))
  if init == "preview":
    near_Q = given_drafts(ctx, "init").at[slots_Q].get(
        mode="fill", fill_value=-1)
    exists_Q = is_point_Q = near_Q >= 0
    return _where(exists_Q, near_Q, random_Q, q_QV, is_point_Q)
  source_Q, exists_Q = _neighbours(ctx.model.grid, init, slots_Q, last)
  if init.startswith("repeat"):
    near_Q, is_point_Q = tokens_N[source_Q], exists_Q
  else:
    near_Q = sampling.sample_inverse(q_QV, ctx.pass_key(_SAMPLE_PURPOSE))
    is_point_Q = jnp.zeros(size, bool)
  return _where(exists_Q, near_Q, random_Q, q_QV, is_point_Q)


def _where(
    exists_Q: jax.Array, near_Q: jax.Array, random_Q: jax.Array,
    q_QV: jax.Array, is_point_Q: jax.Array,
) -> Drafts:
  """Returns drafts that are random where nothing else exists."""
  return Drafts(
      jnp.where(exists_Q, near_Q, random_Q),
      jnp.where(exists_Q[:, None], q_QV, 1.0 / q_QV.shape[1]), is_point_Q)


def _neighbours(
    grid: Grid, init: str, slots_Q: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the nearest slot up to `last`, left or above, and which exist."""
  if init.endswith("left"):
    source_Q = jnp.broadcast_to(last, slots_Q.shape)
    same_row_Q = source_Q // grid.row_slots == slots_Q // grid.row_slots
    return source_Q, same_row_Q
  rows_up_Q = jnp.maximum(-((last - slots_Q) // grid.row_slots), 1)
  source_Q = slots_Q - rows_up_Q * grid.row_slots
  return source_Q, source_Q >= 0
