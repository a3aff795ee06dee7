"""Rows in flight: what all decoders that work on several rows share.

A window of R rows looks at M cells of each: row `lead + r` feeds the columns
first[r] .. first[r] + M - 1 and so predicts those one further right. Column -1
is the slot before the row: the forced end of the row above or, where there is
none, its last cell, which may still be a draft. A *full* window feeds whole
rows, their last slots as the first queries of the rows below.

Each pass feeds every slot of the window that holds a token, tests drafts by the
distribution q they were last drawn from, and redraws rejected ones at once.
Which tokens become final, and when rows enter, is each decoder's schedule.

Invariants: a slot that was never fed is never visible; a final token never
changes; above `lead` everything is final, and fed as such unless the window
still feeds it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax import sampling
from ssd_jax.config import UserError
from ssd_jax.decoding import acceptance
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.grid import Grid
from ssd_jax.types import Queries

# Purposes of a pass's keys.
TEST, REDRAW, DRAFT, REFRESH = range(4)


@flax.struct.dataclass
class Rows:
  """One image's progress; W = R x M cells of the window, row by row.

  Attributes:
    tokens: int32 [N], drafts included.
    final: bool [N].
    known: bool [N], slots that hold a token: forced, final or a draft.
    written: bool [N], slots that were ever fed.
    settled: bool [N], slots whose final token has been fed.
    lead: int32 [], first row of the window.
    entered: int32 [], rows that were drafted; the window feeds no others.
    first: int32 [R], first column that each row of the window feeds.
    q: float32 [W, V], distribution each predicted cell was last drawn from.
    hidden: [G, D], state that predicted cell 0.
    plan: The schedule's own counters, or None.
  """

  tokens: jax.Array
  final: jax.Array
  known: jax.Array
  written: jax.Array
  settled: jax.Array
  lead: jax.Array
  entered: jax.Array
  first: jax.Array
  q: jax.Array
  hidden: jax.Array
  plan: Any = None


@flax.struct.dataclass
class Verdict:
  """What a pass says about the cell that each query of the window predicts.

  Attributes:
    cells: int32 [W], their slots; N where there is none.
    is_open: bool [W], predicted and not final.
    had_draft: bool [W], open and drafted before.
    passed: bool [W], the draft passed its test.
    tokens: int32 [W], the draft if it passed, else a new draw.
    p: float32 [W, V], targets.
  """

  cells: jax.Array
  is_open: jax.Array
  had_draft: jax.Array
  passed: jax.Array
  tokens: jax.Array
  p: jax.Array


def start(
    ctx: Context, p_V: jax.Array, hidden_GD: jax.Array, first_R: jax.Array,
    width: int,
) -> Rows:
  """State after the prefill: cell 0 is final, and row 0 has entered."""
  grid, vocab = ctx.model.grid, ctx.model.vocab
  forced_N = jnp.asarray(grid.is_forced)
  token = sampling.sample(p_V[None], ctx.token_noise(jnp.zeros(1, jnp.int32)))
  final_N = forced_N.at[0].set(True)
  none_N = jnp.zeros(grid.length, bool)
  state = Rows(
      jnp.maximum(grid.forced_tokens(vocab), 0).at[0].set(token[0]),
      final_N, final_N, none_N, none_N, jnp.int32(0), jnp.int32(1), first_R,
      jnp.zeros((first_R.shape[0] * width, vocab)), hidden_GD,
  )
  origin = window_index(state, jnp.int32(0), jnp.int32(0))
  return state.replace(q=state.q.at[origin].set(p_V, mode="drop"))


def full_window(grid: Grid, rows: int) -> tuple[jax.Array, int]:
  """(first [R], width) of a window that feeds whole rows."""
  return jnp.full(rows, grid.cols - grid.row_slots - 1), grid.row_slots


def propose(ctx: Context, state: Rows, row_causal: bool = False) -> Queries:
  """The window's slots that hold tokens, each seeing what stands before it.

  Args:
    ctx: Of the pass.
    state: Of the image.
    row_causal: Hide drafts of other rows (PJD, section 3.3). The slot before
      a row counts as that row's.
  """
  grid = ctx.model.grid
  row_W, col_W = _coordinates(state)
  slots_W = row_W * grid.row_slots + col_W
  inside_W = (slots_W >= 0) & (col_W < grid.cols) & (row_W < state.entered)
  slots_W = jnp.where(inside_W, slots_W, grid.length)
  known_W = state.known.at[slots_W].get(mode="fill", fill_value=False)
  slots_W = jnp.where(known_W, slots_W, grid.length)
  written_N = state.written.at[slots_W].set(True, mode="drop")
  all_N = jnp.arange(grid.length)
  visible_WN = (all_N <= slots_W[:, None]) & written_N
  if row_causal:
    owner = lambda slots: (slots + 1) // grid.row_slots
    visible_WN &= state.final | (owner(all_N) == owner(slots_W)[:, None])
  positions_W = jnp.minimum(slots_W, grid.length - 1)
  return Queries(state.tokens[positions_W], positions_W, slots_W, visible_WN)


def judge(
    ctx: Context, state: Rows, queries: Queries, p_WV: jax.Array,
    coupled: bool = False,
) -> Verdict:
  """Tests the drafts of the window and redraws those that fail.

  Args:
    ctx: Of the pass.
    state: Before the pass.
    queries: Of the pass.
    p_WV: Target of the slot after each query.
    coupled: Draw every cell with its own noise, the same in every pass; a draft
      passes if it is drawn again. Else drafts pass with min(1, p / q) and are
      redrawn from the residual, with the pass's noise.
  """
  grid = ctx.model.grid
  row_W, col_W = _coordinates(state)
  fed_W = (queries.slots < grid.length) & (col_W + 1 < grid.cols)
  cells_W = jnp.where(
      fed_W, row_W * grid.row_slots + col_W + 1, grid.length
  )
  is_at = lambda x_N: x_N.at[cells_W].get(mode="fill", fill_value=False)
  is_open_W = fed_W & ~is_at(state.final)
  draft_W = state.tokens.at[cells_W].get(mode="fill", fill_value=0)
  # A stand-in was not drawn: its q is zero.
  had_draft_W = (
      is_open_W & is_at(state.known) & (acceptance.at(state.q, draft_W) > 0)
  )
  if coupled:
    drawn_W = sampling.sample(p_WV, ctx.token_noise(cells_W))
    passed_W = had_draft_W & (drawn_W == draft_W)
  else:
    drafts = Drafts(draft_W, state.q, jnp.zeros_like(fed_W))
    u_W = jax.random.uniform(ctx.pass_key(TEST), cells_W.shape)
    passed_W = had_draft_W & acceptance.accept_exact(p_WV, drafts, u_W)
    left_WV = jnp.where(
        had_draft_W[:, None], acceptance.residual(p_WV, drafts), p_WV
    )
    noise_WV = jax.random.gumbel(ctx.pass_key(REDRAW), p_WV.shape)
    drawn_W = sampling.sample(left_WV, noise_WV)
  return Verdict(
      cells_W, is_open_W, had_draft_W, passed_W,
      jnp.where(passed_W, draft_W, drawn_W), p_WV,
  )


def commit(
    state: Rows, queries: Queries, verdict: Verdict, redrawn_W: jax.Array,
    final_W: jax.Array,
) -> Rows:
  """State with a verdict carried out.

  Args:
    state: Before the pass.
    queries: Of the pass.
    verdict: On it.
    redrawn_W: bool, cells that take the verdict's token and target.
    final_W: bool, cells that become final.
  """
  nowhere = state.tokens.shape[0]
  pick = lambda is_W: jnp.where(is_W, verdict.cells, nowhere)
  tokens_N = state.tokens.at[pick(redrawn_W)].set(verdict.tokens, mode="drop")
  final_N = state.final.at[pick(final_W)].set(True, mode="drop")
  same_W = tokens_N[queries.positions] == queries.tokens
  fed_N = jnp.zeros_like(final_N).at[queries.slots].set(same_W, mode="drop")
  return state.replace(
      tokens=tokens_N,
      final=final_N,
      known=state.known.at[pick(redrawn_W)].set(True, mode="drop"),
      written=state.written.at[queries.slots].set(True, mode="drop"),
      settled=state.settled | (fed_N & final_N),
      q=jnp.where(redrawn_W[:, None], verdict.p, state.q),
  )


def move(state: Rows, lead: jax.Array, first_R: jax.Array) -> Rows:
  """State whose window begins elsewhere; q moves along with its cells."""
  moved = state.replace(lead=lead, first=first_R)
  row_W, col_W = _coordinates(moved)
  source_W = window_index(state, row_W, col_W + 1)
  return moved.replace(
      q=state.q.at[source_W].get(mode="fill", fill_value=0.0)
  )


def full_lead(grid: Grid, state: Rows) -> jax.Array:
  """int32 []: where a full window begins.

  A row leaves once it is final. Its last slots are fed once more by the row
  below, so that row must still be there.
  """
  cells = jnp.asarray(grid.slot_of)
  whole = lambda x_N: jnp.argmin(jnp.all(x_N[cells], axis=1))
  return jnp.minimum(whole(state.final), whole(state.settled) + 1)


def narrow_lead(grid: Grid, state: Rows) -> jax.Array:
  """int32 []: where a window of single slots begins: nothing above is left."""
  return jnp.argmin(jnp.all(state.settled[jnp.asarray(grid.slot_of)], axis=1))


def fill(grid: Grid, final_N: jax.Array) -> jax.Array:
  """int32 [grid rows]: final cells of each row."""
  return jnp.sum(final_N[jnp.asarray(grid.slot_of)], axis=1)


def window_index(
    state: Rows, row: jax.Array, col: jax.Array
) -> jax.Array:
  """int32 [...]: index of cells among those predicted; W for cells outside."""
  rows, size = state.first.shape[0], state.q.shape[0]
  width = size // rows
  r = row - state.lead
  m = col - 1 - state.first.at[r].get(mode="clip")
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


def predicted(state: Rows) -> tuple[jax.Array, jax.Array]:
  """(row, column) [W] of the cells that the window predicts."""
  row_W, col_W = _coordinates(state)
  return row_W, col_W + 1


def _coordinates(state: Rows) -> tuple[jax.Array, jax.Array]:
  """(row, column) [W] of the slots that the window feeds."""
  rows = state.first.shape[0]
  width = state.q.shape[0] // rows
  row_RM = jnp.broadcast_to(
      state.lead + jnp.arange(rows)[:, None], (rows, width)
  )
  col_RM = state.first[:, None] + jnp.arange(width)
  return row_RM.reshape(-1), col_RM.reshape(-1)
