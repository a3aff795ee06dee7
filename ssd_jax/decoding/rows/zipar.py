"""ZipAR: one cell per row and pass, each row some cells behind the row above.

Nothing is drafted and nothing verified but, with the adaptive window, the first
cell of a row. A cell never sees what comes later in the rows above.

Source: ZipAR, arXiv:2412.04062.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ssd_jax.core.config import check
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Model, Queries
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import (
  drafts as row_drafts,
  queries as row_queries,
  state as rows_lib,
)
from ssd_jax.decoding.rows.state import Rows, Verdict


@dataclasses.dataclass(frozen=True)
class ZipAR:
  """Rows start when the row above has `window` tokens.

  On grids with end-of-row tokens the one before a row counts as its first. On
  others row 1 waits for the whole of row 0, and a row that starts before the
  one above ends sees, in place of that row's last token, the last one of the
  row above that.

  Attributes:
    window: Tokens of the row above that a row needs; as many as a row has make
      it AR.
    adaptive: A row's first token is only a candidate. It is tested under each
      longer window by min(1, p' / p), p being what it was drawn from, and
      redrawn from what is left of p' where it fails; the row starts once it
      passes, or the row above is whole.
  """

  window: int = 8
  adaptive: bool = False

  name = "zipar"
  lossless = False

  def __post_init__(self):
    check(self.window >= 1, "window", self.window, ">= 1")

  def lossless_on(self, grid: Grid) -> bool:
    """Whether rows wait for the whole of the row above: AR, token for token."""
    return grid.rows == 1 or self._lag(grid) == grid.cols

  def scratch(self, model: Model) -> int:
    """None."""
    return 0

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """State with the first cell final."""
    grid = ctx.model.grid
    rows = min(-(-grid.cols // self._lag(grid)), grid.rows)
    state = rows_lib.start(ctx, p_V, hidden_GD, rows, 1)
    return self._advance(grid, state)

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """The last token of every row.

    A row's very last is fed beside the rows below it, which are a whole lag
    behind each other.
    """
    grid = ctx.model.grid
    count_H = jnp.where(jnp.arange(grid.rows) < state.entered, 1, 0)
    needed_N = row_queries.frontier(grid, state, count_H)
    size = min(1 + grid.cols // self._lag(grid), grid.rows + 1)
    return row_queries.propose(ctx, state, needed_N, size)

  def resolve(
      self, ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Rows:
    """State with one more cell in every row."""
    del hidden_GQD
    verdict = rows_lib.verify(ctx, state, queries, p_QV, coupled=True)
    final_Q = verdict.is_open
    if self.adaptive:
      verdict, is_final_Q = self._judge_candidates(ctx, state, queries, verdict)
      final_Q &= is_final_Q
    state = rows_lib.commit(
        state, queries, verdict, verdict.is_open, final_Q
    )
    return self._advance(ctx.model.grid, state)

  def _judge_candidates(
      self, ctx: Context, state: Rows, queries: Queries, verdict: Verdict
  ) -> tuple[Verdict, jax.Array]:
    """(verdict, bool [Q] which cells are no mere candidates).

    Source: ZipAR, section 3.3.
    """
    grid = ctx.model.grid
    tested = rows_lib.verify(ctx, state, queries, verdict.p)
    row_Q, col_Q = rows_lib.place(grid, verdict.cells)
    is_first_Q = col_Q == 0
    is_free_Q = row_Q <= state.lead
    tokens_Q = jnp.where(
        is_first_Q & tested.had_draft, tested.tokens, verdict.tokens
    )
    return (
        verdict.replace(tokens=tokens_Q),
        ~is_first_Q | is_free_Q | tested.accepted,
    )

  def _advance(self, grid: Grid, state: Rows) -> Rows:
    """State with the next row begun if it is due."""
    row, rows = state.entered, state.first.shape[0]
    fill_H = rows_lib.prefix(grid, state.final)
    lead = rows_lib.first_open(grid, state.final)
    is_row_1 = (row == 1) & (not grid.end_of_row)
    needed = jnp.where(is_row_1, grid.cols, self._lag(grid))
    is_due = (
        (row < jnp.minimum(grid.rows, lead + rows))
        & (fill_H[row - 1] >= needed)
    )
    # The row above has none to spare; the one above that is further.
    source = (row - 2) * grid.row_slots + fill_H[row - 2] - 1
    state = row_drafts.stand_in(grid, state, row, source, is_due)
    fill_R = fill_H.at[lead + jnp.arange(rows)].get(mode="clip")
    state = rows_lib.shift_window(state, lead, fill_R)
    return state.replace(entered=row + is_due)

  def _lag(self, grid: Grid) -> int:
    """Cells of the row above that a row needs."""
    least = 1 + int(grid.end_of_row)
    check(self.window >= least, "window", self.window,
          f">= {least} on this grid")
    return min(self.window + 1 - least, grid.cols)
