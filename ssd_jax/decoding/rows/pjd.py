"""PJD: a window of Jacobi drafts in each of several rows, no training needed.

A row becomes active once the row above has `context` final cells. Each active
row drafts a few cells beyond its final ones, is verified on its own from left
to right, and keeps the drafts up to the first that fails. Only the top row also
redraws that one; elsewhere it and all after it are drafted afresh. No row
overtakes the one above.

Source: Parallel Jacobi Decoding, arXiv:2606.05703, algorithm 1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ssd_jax.core.config import check
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Model, Queries
from ssd_jax.decoding import acceptance, sampling
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import (
  drafts as row_drafts,
  queries as row_queries,
  state as rows_lib,
)
from ssd_jax.decoding.rows.state import Rows, Verdict

_KEEP = 0.5  # least probability to pass of a draft that is kept


@dataclasses.dataclass(frozen=True)
class PJD:
  """Parallel Jacobi decoding.

  Attributes:
    context: Final cells of a row at which the row below becomes active. (The
      published code also counts the token before the row.)
    window: Cells of a row that a pass predicts: its drafts and the one after.
    row_causal: Hide the drafts of other rows.
    keep: Keep drafts after the first rejection, and what they were drawn from,
      where they would pass with a probability above one half, as the published
      code does; else draw all of them afresh.
  """

  context: int = 4
  window: int = 8
  row_causal: bool = True
  keep: bool = False

  name = "pjd"
  lossless = False

  def __post_init__(self):
    check(self.context >= 1, "context", self.context, ">= 1")
    check(self.window >= 1, "window", self.window, ">= 1")

  def scratch(self, model: Model) -> int:
    """None."""
    return 0

  def lossless_on(self, grid: Grid) -> bool:
    """Whether rows follow each other: then only the top row is drafted."""
    is_alone = grid.rows == 1 or self._context(grid) == grid.cols
    return is_alone and not self.keep

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """State with row 0 active."""
    grid = ctx.model.grid
    rows = min(grid.rows, -(-grid.cols // self._context(grid)) + 1)
    width = min(self.window, grid.cols)
    return self._advance(ctx, rows_lib.start(ctx, p_V, hidden_GD, rows, width))

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """Each active row's last final cell and its drafts.

    A row's window ends where the final cells above it do, so that all windows
    together are no longer than a row; a row's last cell may be to feed besides.
    """
    grid = ctx.model.grid
    fill_H = rows_lib.prefix(grid, state.final)
    count_H = self._window(grid, fill_H)
    row_H = jnp.arange(grid.rows)
    # A window of one cell has no draft; only the top row draws without.
    is_idle_H = (count_H == 1) & (row_H != state.lead)
    is_idle_H |= row_H >= state.entered
    count_H = jnp.where(is_idle_H, 0, count_H)
    needed_N = row_queries.frontier(grid, state, count_H)
    size = 1 + min(len(state.q), grid.cols)
    return row_queries.propose(ctx, state, needed_N, size, self.row_causal)

  def resolve(
      self, ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Rows:
    """State with each active row's accepted drafts final, the rest redrawn."""
    del hidden_GQD
    grid = ctx.model.grid
    verdict = rows_lib.verify(ctx, state, queries, p_QV)
    row_Q, col_Q = rows_lib.place(grid, verdict.cells)
    run_H = rows_lib.accepted_prefix(grid, state, verdict)
    is_top_H = jnp.arange(grid.rows) == state.lead
    final_Q = verdict.is_open & (col_Q < (run_H + is_top_H)[row_Q])
    fresh_Q = sampling.sample_inverse(p_QV, ctx.pass_key(rows_lib.REFRESH))
    verdict = verdict.replace(
        tokens=jnp.where(final_Q, verdict.tokens, fresh_Q))
    at_Q = jnp.where(final_Q, verdict.cells, grid.length)
    fill_H = rows_lib.prefix(grid, state.final.at[at_Q].set(True, mode="drop"))
    # The cell after the last draft is one itself, if there is room for it.
    end_H = fill_H + self._drafts(grid, fill_H)
    resampled_Q = verdict.is_open & (final_Q | (col_Q < end_H[row_Q]))
    if self.keep:
      # The rejected draft itself is never kept.
      is_behind_Q = col_Q > run_H[row_Q]
      resampled_Q &= final_Q | ~(is_behind_Q & self._is_likely(state, verdict))
    state = rows_lib.commit(state, queries, verdict, resampled_Q, final_Q)
    return self._advance(ctx, state)

  def _is_likely(self, state: Rows, verdict: Verdict) -> jax.Array:
    """bool [Q]: drafts that would pass more often than not."""
    drafts_Q = state.tokens.at[verdict.cells].get(mode="fill", fill_value=0)
    q_QV = state.q.at[verdict.index].get(mode="fill", fill_value=0.0)
    return verdict.had_draft & (
        acceptance.at(verdict.p, drafts_Q)
        > _KEEP * acceptance.at(q_QV, drafts_Q)
    )

  def _advance(self, ctx: Context, state: Rows) -> Rows:
    """State with the next row active if it is due, and windows topped up."""
    grid, row = ctx.model.grid, state.entered
    fill_H = rows_lib.prefix(grid, state.final)
    lead = rows_lib.first_open(grid, state.final)
    rows = state.first.shape[0]
    is_due = (
        (row < jnp.minimum(grid.rows, lead + rows))
        & (fill_H[row - 1] >= self._context(grid))
    )
    last = (row - 1) * grid.row_slots + fill_H[row - 1] - 1
    state = row_drafts.stand_in(grid, state, row, last, is_due)
    state = state.replace(entered=row + is_due)
    fill_R = fill_H.at[lead + jnp.arange(rows)].get(mode="clip")
    state = rows_lib.shift_window(state, lead, fill_R)
    return self._top_up(ctx, state, fill_H)

  def _top_up(self, ctx: Context, state: Rows, fill_H: jax.Array) -> Rows:
    """State with random drafts where a row has fewer than it may."""
    grid, vocab = ctx.model.grid, ctx.model.vocab
    row_W, col_W = rows_lib.window(state)
    end_H = fill_H + self._drafts(grid, fill_H)
    is_draft_W = (
        (row_W < state.entered) & (col_W < end_H.at[row_W].get(mode="clip"))
    )
    slots_W = jnp.where(is_draft_W, row_W * grid.row_slots + col_W, grid.length)
    token_W = state.tokens.at[slots_W].get(mode="fill", fill_value=0)
    known_W = state.known.at[slots_W].get(mode="fill", fill_value=False)
    is_new_W = is_draft_W & ~(known_W & (acceptance.at(state.q, token_W) > 0))
    random_W = jax.random.randint(
        ctx.pass_key(rows_lib.DRAFT), slots_W.shape, 0, vocab
    )
    # A token that stands in for the row below becomes this row's draft.
    q_WV = jnp.where(
        known_W[:, None], jax.nn.one_hot(token_W, vocab), 1.0 / vocab
    )
    drafts = Drafts(
        jnp.where(known_W, token_W, random_W), q_WV, jnp.zeros_like(known_W)
    )
    return row_drafts.put_drafts(
        state, slots_W, jnp.arange(len(slots_W)), drafts, is_new_W
    )

  def _window(self, grid: Grid, fill_H: jax.Array) -> jax.Array:
    """int32 [H]: cells of each row that a pass may look at.

    They end at the last final cell above.
    """
    above_H = jnp.concatenate([jnp.full(1, grid.cols), fill_H[:-1]])
    return jnp.clip(above_H - fill_H, 0, min(self.window, grid.cols))

  def _drafts(self, grid: Grid, fill_H: jax.Array) -> jax.Array:
    """int32 [H]: drafts that each row may hold, one less than it looks at."""
    return jnp.maximum(self._window(grid, fill_H) - 1, 0)

  def _context(self, grid: Grid) -> int:
    return rows_lib.clamp(self, "context", grid.cols, "the columns")
