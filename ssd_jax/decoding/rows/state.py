"""Rows in flight: what all decoders that work on several rows share.

A pass feeds slots of the rows that have entered; the query at a slot yields the
target of the next one. Drafts are tested by the distribution q they were last
drawn from, and redrawn at once if they fail. Which slots are fed, which tokens
become final and when rows enter is each decoder's schedule.

The q of R x M cells are kept: of M columns in each of R rows, from `lead` on,
the first row that is not final.

A final token never changes.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Queries
from ssd_jax.decoding import acceptance, sampling
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context

# Purposes of a pass's keys.
TEST, RESAMPLE, DRAFT, REFRESH = range(4)


class Rows(flax.struct.PyTreeNode):
  """One image's progress; W = R x M cells of the window, row by row.

  Attributes:
    tokens: int32 [N], drafts included.
    final: bool [N].
    known: bool [N], slots that hold a token: forced, final or a draft.
    written: bool [N], slots that were ever fed.
    settled: bool [N], slots whose final token has been fed.
    tested: bool [N], cells whose token a pass has kept or drawn.
    lead: int32 [], first row of the window.
    entered: int32 [], rows that were drafted; no others are fed.
    first: int32 [R], first column of each row of the window.
    q: float32 [W, V], distribution each cell was last drawn from.
    hidden: [G, D], state that predicted cell 0.
    plan: The schedule's own counters, or None.
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
  """What a pass says about the cell that each query predicts.

  Attributes:
    cells: int32 [Q], their slots; N where there is none.
    index: int32 [Q], their places in the window; W outside.
    is_open: bool [Q], predicted and not final.
    had_draft: bool [Q], open and drafted before.
    accepted: bool [Q], the draft passed its test.
    tokens: int32 [Q], the draft if it passed, else a new draw.
    p: float32 [Q, V], targets.
    law: float32 [Q, V], what the tokens are drawn from: p, but for leniently
      tested drafts.
  """

  cells: jax.Array
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
  """State after the prefill: cell 0 is final, and row 0 has entered."""
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
    ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
    coupled: bool = False, lenience: float = 1.0, eager: bool = False,
) -> Verdict:
  """Tests the drafts that were looked at and redraws those that fail.

  Args:
    ctx: Of the pass.
    state: Before the pass.
    queries: Of the pass.
    p_QV: Target of the slot after each query.
    coupled: Draw every cell with its own noise, the same in every pass; a draft
      passes if it is drawn again. Else drafts pass with min(1, p / q) and are
      redrawn from the residual, with the pass's noise.
    lenience: What q is multiplied by in that test; below 1 relaxed. The law
      that follows is kept as the next q: however often a cell is tested, no
      token is more than 1 / lenience times as probable there as the model says.
    eager: Be lenient in a cell's first test too. Else that one is strict, so
      that what its draft was made from leaves no trace.
  """
  grid = ctx.model.grid
  is_forced_N = jnp.asarray(grid.is_forced)
  is_none_Q = is_forced_N.at[queries.slots + 1].get(
      mode="fill", fill_value=True
  )
  cells_Q = jnp.where(is_none_Q, grid.length, queries.slots + 1)
  index_Q = window_index(state, *place(grid, cells_Q))
  q_QV = state.q.at[index_Q].get(mode="fill", fill_value=0.0)
  is_at = lambda x_N: x_N.at[cells_Q].get(mode="fill", fill_value=False)
  is_open_Q = ~is_none_Q & ~is_at(state.final)
  draft_Q = state.tokens.at[cells_Q].get(mode="fill", fill_value=0)
  # A stand-in was not drawn: its q is zero. One that is no number was, or the
  # loop would never end.
  had_draft_Q = (
      is_open_Q & is_at(state.known) & (acceptance.at(q_QV, draft_Q) != 0)
  )
  dist_QV = p_QV
  if coupled:
    drawn_Q = sampling.sample(p_QV, ctx.token_noise(cells_Q))
    accepted_Q = had_draft_Q & (drawn_Q == draft_Q)
  else:
    drafts = Drafts(draft_Q, q_QV, jnp.zeros_like(is_open_Q))
    lenience_Q = jnp.where(eager | is_at(state.tested), lenience, 1.0)
    accepted_Q, drawn_Q = _test(ctx, p_QV, drafts, had_draft_Q, lenience_Q)
    if lenience < 1:
      dist_QV = jnp.where(
          had_draft_Q[:, None],
          acceptance.lenient_distribution(p_QV, drafts, lenience_Q), p_QV
      )
  return Verdict(
      cells_Q, index_Q, is_open_Q, had_draft_Q, accepted_Q,
      jnp.where(accepted_Q, draft_Q, drawn_Q), p_QV, dist_QV,
  )


def _test(
    ctx: Context, p_QV: jax.Array, drafts: Drafts, had_draft_Q: jax.Array,
    lenience_Q: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """(bool [Q] drafts that passed, int32 [Q] what is drawn for the others)."""
  u_Q = jax.random.uniform(ctx.pass_key(TEST), had_draft_Q.shape)
  accepted_Q = acceptance.accept_exact(p_QV, drafts, u_Q, lenience_Q)
  left_QV = jnp.where(
      had_draft_Q[:, None], acceptance.residual(p_QV, drafts), p_QV
  )
  drawn_Q = sampling.sample_inverse(left_QV, ctx.pass_key(RESAMPLE))
  return had_draft_Q & accepted_Q, drawn_Q


def commit(
    state: Rows, queries: Queries, verdict: Verdict, resampled_Q: jax.Array,
    final_Q: jax.Array,
) -> Rows:
  """State with a verdict carried out.

  Args:
    state: Before the pass.
    queries: Of the pass.
    verdict: On it.
    redrawn_Q: bool, cells that take the verdict's token and law.
    final_Q: bool, cells that become final.
  """
  nowhere, outside = state.tokens.shape[0], state.q.shape[0]
  pick = lambda is_Q: jnp.where(is_Q, verdict.cells, nowhere)
  tokens_N = state.tokens.at[pick(resampled_Q)].set(verdict.tokens, mode="drop")
  final_N = state.final.at[pick(final_Q)].set(True, mode="drop")
  same_Q = tokens_N[queries.positions] == queries.tokens
  fed_N = jnp.zeros_like(final_N).at[queries.slots].set(same_Q, mode="drop")
  index_Q = jnp.where(resampled_Q, verdict.index, outside)
  return state.replace(
      tokens=tokens_N,
      final=final_N,
      known=state.known.at[pick(resampled_Q)].set(True, mode="drop"),
      tested=state.tested.at[pick(resampled_Q)].set(True, mode="drop"),
      written=state.written.at[queries.slots].set(True, mode="drop"),
      settled=state.settled | (fed_N & final_N),
      q=state.q.at[index_Q].set(verdict.distribution, mode="drop"),
  )


def shift_window(state: Rows, lead: jax.Array, first_R: jax.Array) -> Rows:
  """State whose window begins elsewhere; q moves along with its cells."""
  moved = state.replace(lead=lead, first=first_R)
  source_W = window_index(state, *window(moved))
  return moved.replace(
      q=state.q.at[source_W].get(mode="fill", fill_value=0.0)
  )


def first_open(grid: Grid, final_N: jax.Array) -> jax.Array:
  """int32 []: the first row that is not final."""
  whole_H = jnp.all(final_N[jnp.asarray(grid.slot_of)], axis=1)
  return jnp.argmin(whole_H).astype(jnp.int32)


def prefix(grid: Grid, is_N: jax.Array) -> jax.Array:
  """int32 [grid rows]: the leading cells of each row that are so."""
  is_HC = is_N[jnp.asarray(grid.slot_of)].astype(jnp.int32)
  return jnp.sum(jnp.cumprod(is_HC, axis=1), axis=1)


def accepted_prefix(grid: Grid, state: Rows, verdict: Verdict) -> jax.Array:
  """int32 [grid rows]: leading cells of each row that are final or passed."""
  at_Q = jnp.where(verdict.accepted, verdict.cells, grid.length)
  return prefix(grid, state.final.at[at_Q].set(True, mode="drop"))


def place(grid: Grid, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(row, column) of slots; a column of the last row beyond the image."""
  row = jnp.minimum(slots // grid.row_slots, grid.rows - 1)
  return row, slots - row * grid.row_slots


def window(state: Rows) -> tuple[jax.Array, jax.Array]:
  """(row, column) [W] of the cells of the window, beyond the image too."""
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
  """int32 [...]: index of cells in the window; W for cells outside."""
  rows, size = state.first.shape[0], state.q.shape[0]
  width = size // rows
  r = row - state.lead
  m = col - state.first.at[r].get(mode="clip")
  inside = (r >= 0) & (r < rows) & (m >= 0) & (m < width)
  return jnp.where(inside, r * width + m, size)


def clamp(decoder: Any, field: str, most: int, what: str) -> int:
  """A setting that may not exceed `most`; a class default is cut to it.

  Raises:
    UserError: if another value than the default is larger.
  """
  value = getattr(decoder, field)
  if value > most and value != getattr(type(decoder), field):
    raise UserError(
        f"got {field}={value}, expected at most {most} ({what}); lower {field}"
    )
  return min(value, most)
