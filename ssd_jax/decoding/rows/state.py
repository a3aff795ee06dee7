"""State and verification shared by decoders that work on several rows.

A pass feeds slots of the rows that have entered; the query at a slot predicts
the target of the next slot. Drafts are tested with the distribution q that they
were last sampled from, and rejected drafts are resampled in the same pass. Each
decoder's schedule decides which slots are fed, which tokens become final and
when rows enter.

The window stores q for R x M grid positions: M columns in each of R rows,
starting at row `lead`, the first row that is not final.

A final token never changes.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import check
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Queries
from ssd_jax.decoding import acceptance, sampling
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context

# Purposes of the random keys of a pass.
TEST, RESAMPLE, DRAFT, REFRESH, GUESS, *_SECOND = range(7)
SECOND = tuple(_SECOND)  # test and resampling after a right guess


class Rows(flax.struct.PyTreeNode):
  """Decoding state of one image; the window has W = R x M positions, row-major.

  Attributes:
    tokens: int32 [N], drafts included.
    final: bool [N], which slots are final.
    known: bool [N], slots that hold a token: forced, final or a draft.
    written: bool [N], slots that were ever fed.
    settled: bool [N], slots whose final token has been fed.
    tested: bool [N], slots whose token a pass has accepted or resampled.
    lead: int32 [], first row of the window.
    entered: int32 [], number of rows that were drafted; no others are fed.
    first: int32 [R], first column of each row of the window.
    q: float32 [W, V], distribution that each token was last sampled from.
    hidden: [G, D], hidden state that predicted slot 0.
    plan: Counters of the decoder's schedule, or None.
  """

  tokens: jax.Array
  final: jax.Array
  known: jax.Array
  written: jax.Array
  settled: jax.Array
  tested: jax.Array
  lead: jax.Array
  entered: jax.Array
  first: jax.Array
  q: jax.Array
  hidden: jax.Array
  plan: Any = None


class Verdict(flax.struct.PyTreeNode):
  """The outcome of a pass for the slot that each query predicts.

  Attributes:
    slots: int32 [Q], predicted slots; N where there is none.
    index: int32 [Q], their indices in the window; W outside of it.
    is_open: bool [Q], whether the slot exists and is not final.
    had_draft: bool [Q], whether the slot is open and held a draft.
    accepted: bool [Q], whether the draft was accepted.
    tokens: int32 [Q], the accepted draft, else a resampled token.
    p: float32 [Q, V], target distributions.
    distribution: float32 [Q, V], distributions that the tokens are sampled
      from: p, except for leniently tested drafts.
  """

  slots: jax.Array
  index: jax.Array
  is_open: jax.Array
  had_draft: jax.Array
  accepted: jax.Array
  tokens: jax.Array
  p: jax.Array
  distribution: jax.Array


def start(
    ctx: Context, p_V: jax.Array, hidden_GD: jax.Array, rows: int, width: int
) -> Rows:
  """Returns the state after the prefill: token 0 is final, row 0 entered."""
  grid, vocab = ctx.model.grid, ctx.model.vocab
  token = sampling.sample(p_V[None], ctx.token_noise(jnp.zeros(1, jnp.int32)))
  final_N = jnp.asarray(grid.is_forced).at[0].set(True)
  none_N = jnp.zeros(grid.length, bool)
  return Rows(
      jnp.maximum(grid.forced_tokens(vocab), 0).at[0].set(token[0]),
      final_N, final_N, none_N, none_N, none_N, jnp.int32(0), jnp.int32(1),
      jnp.zeros(rows, jnp.int32),
      jnp.zeros((rows * width, vocab)).at[0].set(p_V), hidden_GD,
  )


def verify(
    ctx: Context, state: Rows, fed_Q: jax.Array, p_QV: jax.Array,
    coupled: bool = False, lenience: float = 1.0, eager: bool = False,
    purposes: tuple[int, int] = (TEST, RESAMPLE),
) -> Verdict:
  """Tests the drafts of the predicted slots and resamples the rejected ones.

  Args:
    ctx: Context of the pass.
    state: State before the pass.
    fed_Q: Slots that the pass feeds; N or more where a query is inactive.
    p_QV: Target distribution of the slot after each of them.
    coupled: Whether to sample every slot with its own noise, equal in every
      pass, and accept a draft if it is sampled again. Otherwise drafts are
      accepted with probability min(1, p / q) and resampled from the residual,
      with the noise of the pass.
    lenience: Factor that q is multiplied by in the test; below 1 the test is
      relaxed. The resulting distribution is stored as the next q, so that no
      token becomes more than 1 / lenience times as probable as under the
      model, however often its slot is tested.
    eager: Whether a slot's first test is lenient too. Otherwise it is exact,
      which removes any influence of the distribution it was drafted from.
    purposes: Purposes of the keys of the tests and of resampling.
  """
  grid = ctx.model.grid
  is_forced_N = jnp.asarray(grid.is_forced)
  is_none_Q = is_forced_N.at[fed_Q + 1].get(mode="fill", fill_value=True)
  slots_Q = jnp.where(is_none_Q, grid.length, fed_Q + 1)
  index_Q = window_index(state, *row_and_column(grid, slots_Q))
  q_QV = state.q.at[index_Q].get(mode="fill", fill_value=0.0)
  is_at = lambda x_N: x_N.at[slots_Q].get(mode="fill", fill_value=False)
  is_open_Q = ~is_none_Q & ~is_at(state.final)
  draft_Q = state.tokens.at[slots_Q].get(mode="fill", fill_value=0)
  # A placeholder was not sampled: its q is zero. NaN counts as a draft, or the
  # loop would never end.
  had_draft_Q = (
      is_open_Q & is_at(state.known) & (acceptance.at(q_QV, draft_Q) != 0)
  )
  dist_QV = p_QV
  if coupled:
    resampled_Q = sampling.sample(p_QV, ctx.token_noise(slots_Q))
    accepted_Q = had_draft_Q & (resampled_Q == draft_Q)
  else:
    drafts = Drafts(draft_Q, q_QV, jnp.zeros_like(is_open_Q))
    lenience_Q = jnp.where(eager | is_at(state.tested), lenience, 1.0)
    accepted_Q, resampled_Q = _test(
        ctx, p_QV, drafts, had_draft_Q, lenience_Q, purposes)
    if lenience < 1:
      dist_QV = jnp.where(
          had_draft_Q[:, None],
          acceptance.lenient_distribution(p_QV, drafts, lenience_Q), p_QV
      )
  return Verdict(
      slots_Q, index_Q, is_open_Q, had_draft_Q, accepted_Q,
      jnp.where(accepted_Q, draft_Q, resampled_Q), p_QV, dist_QV,
  )


def _test(
    ctx: Context, p_QV: jax.Array, drafts: Drafts, had_draft_Q: jax.Array,
    lenience_Q: jax.Array, purposes: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
  """Returns the accepted drafts, bool [Q], and resampled tokens, int32 [Q]."""
  test, resample = purposes
  u_Q = jax.random.uniform(ctx.pass_key(test), had_draft_Q.shape)
  accepted_Q = acceptance.accept_exact(p_QV, drafts, u_Q, lenience_Q)
  left_QV = jnp.where(
      had_draft_Q[:, None], acceptance.residual(p_QV, drafts), p_QV
  )
  resampled_Q = sampling.sample_inverse(left_QV, ctx.pass_key(resample))
  return had_draft_Q & accepted_Q, resampled_Q


def commit(
    state: Rows, queries: Queries, verdict: Verdict, written_Q: jax.Array,
    final_Q: jax.Array,
) -> Rows:
  """Writes tokens of a verdict to the state and marks slots as final.

  Args:
    state: State before the pass.
    queries: Queries of the pass.
    verdict: Outcome of the pass.
    written_Q: bool, slots that take the verdict's token and distribution.
    final_Q: bool, slots that become final.
  """
  nowhere, outside = state.tokens.shape[0], state.q.shape[0]
  pick = lambda is_Q: jnp.where(is_Q, verdict.slots, nowhere)
  tokens_N = state.tokens.at[pick(written_Q)].set(verdict.tokens, mode="drop")
  final_N = state.final.at[pick(final_Q)].set(True, mode="drop")
  same_Q = tokens_N[queries.positions] == queries.tokens
  fed_N = jnp.zeros_like(final_N).at[queries.slots].set(same_Q, mode="drop")
  index_Q = jnp.where(written_Q, verdict.index, outside)
  return state.replace(
      tokens=tokens_N,
      final=final_N,
      known=state.known.at[pick(written_Q)].set(True, mode="drop"),
      tested=state.tested.at[pick(written_Q)].set(True, mode="drop"),
      written=state.written.at[queries.slots].set(True, mode="drop"),
      settled=state.settled | (fed_N & final_N),
      q=state.q.at[index_Q].set(verdict.distribution, mode="drop"),
  )


def shift_window(state: Rows, lead: jax.Array, first_R: jax.Array) -> Rows:
  """Moves the window; each q stays with its grid position.

  Args:
    state: State before the move.
    lead: int32 [], new first row of the window.
    first_R: int32 [R], new first column of each row of the window.
  """
  moved = state.replace(lead=lead, first=first_R)
  source_W = window_index(state, *window(moved))
  return moved.replace(
      q=state.q.at[source_W].get(mode="fill", fill_value=0.0)
  )


def first_open_row(grid: Grid, final_N: jax.Array) -> jax.Array:
  """Returns the first row that is not final, int32 []."""
  whole_H = jnp.all(final_N[jnp.asarray(grid.slot_of)], axis=1)
  return jnp.argmin(whole_H).astype(jnp.int32)


def prefix(grid: Grid, is_N: jax.Array) -> jax.Array:
  """Counts the leading positions of each row for which `is_N` holds.

  Returns:
    int32 [grid rows].
  """
  is_HC = is_N[jnp.asarray(grid.slot_of)].astype(jnp.int32)
  return jnp.sum(jnp.cumprod(is_HC, axis=1), axis=1)


def accepted_prefix(grid: Grid, state: Rows, verdict: Verdict) -> jax.Array:
  """Counts the leading tokens of each row that are final or accepted.

  Returns:
    int32 [grid rows].
  """
  at_Q = jnp.where(verdict.accepted, verdict.slots, grid.length)
  return prefix(grid, state.final.at[at_Q].set(True, mode="drop"))


def count_committed(
  fill_R: jax.Array, known_R: jax.Array, fed_R: jax.Array, ahead_RC: jax.Array
) -> jax.Array:
  """Counts the tokens of each row that are final after a pass.

  Args:
    fill_R: int32, tokens that were final before the pass.
    known_R: int32, leading tokens that are final, or would be if the row above
      were.
    fed_R: int32, those of them that the rows below saw.
    ahead_RC: int32, by how many tokens the row above has to be ahead of each
      token.

  Returns:
    int32 [R].
  """
  cols = ahead_RC.shape[1]
  col_C = jnp.arange(cols)

  def step(above, row):
    fill, known, fed, ahead_C = row
    is_allowed_C = (
        (above >= jnp.minimum(col_C + ahead_C, cols)) | (col_C < fill)
    )
    allowed = jnp.sum(jnp.cumprod(is_allowed_C.astype(jnp.int32)))
    return jnp.minimum(fed, allowed), jnp.minimum(known, allowed)

  _, count_R = jax.lax.scan(
      step, jnp.int32(cols), (fill_R, known_R, fed_R, ahead_RC)
  )
  return count_R


def row_and_column(grid: Grid, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the rows and columns of slots.

  Slots beyond the image count as further columns of the last row.
  """
  whole = jax.lax.div(slots, jnp.int32(grid.row_slots))  # `//` is 14 operations
  row = jnp.minimum(whole, grid.rows - 1)
  return row, slots - row * grid.row_slots


def window(state: Rows) -> tuple[jax.Array, jax.Array]:
  """Returns the rows [W] and columns [W] of the window's positions.

  They may lie beyond the image.
  """
  rows = state.first.shape[0]
  width = state.q.shape[0] // rows
  row_RM = jnp.broadcast_to(
      state.lead + jnp.arange(rows)[:, None], (rows, width)
  )
  col_RM = state.first[:, None] + jnp.arange(width)
  return row_RM.reshape(-1), col_RM.reshape(-1)


def window_index(
    state: Rows, row: jax.Array, col: jax.Array
) -> jax.Array:
  """Returns the window index of grid positions, int32 [...]; W if outside."""
  rows, size = state.first.shape[0], state.q.shape[0]
  width = size // rows
  r = row - state.lead
  m = col - state.first.at[r].get(mode="clip")
  inside = (r >= 0) & (r < rows) & (m >= 0) & (m < width)
  return jnp.where(inside, r * width + m, size)


def at_most(
    value: int | None, default: int, most: int, field: str, what: str
) -> int:
  """Returns a setting that the model or the grid limits to `most`.

  Args:
    value: The setting; None selects the default, limited to `most`.
    default: Value used for None.
    most: Largest possible value.
    field: Name of the setting.
    what: Description of the limit.

  Raises:
    UserError: The setting is larger than `most`.
  """
  if value is None:
    return min(default, most)
  check(value <= most, field, value, f"at most {most} ({what})")
  return value
