"""ZipAR: one cell per row and pass, each row some cells behind the row above.

Nothing is drafted and nothing verified but, with the adaptive window, the first
cell of a row. A cell never sees what comes later in the rows above.

Source: ZipAR, arXiv:2412.04062.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ssd_jax.config import check
from ssd_jax.decoding import row_drafts, rows as rows_lib
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import Rows, Verdict
from ssd_jax.grid import Grid
from ssd_jax.types import Model, Queries


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

  def scratch(self, model: Model) -> int:
    """None."""
    return 0

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """State with the first cell final."""
    grid = ctx.model.grid
    # A row that is done stays for the pass that feeds its last cell.
    rows = -(-(grid.cols + 1) // self._lag(grid)) + 1
    first_R = jnp.full(min(rows, grid.rows), -1).at[0].set(0)
    state = rows_lib.start(ctx, p_V, hidden_GD, first_R, 1)
    return self._advance(grid, state)

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """The last token of every row."""
    return rows_lib.propose(ctx, state)

  def resolve(
      self, ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Rows:
    """State with one more cell in every row."""
    del hidden_GQD
    verdict = rows_lib.judge(ctx, state, queries, p_QV, coupled=True)
    final_W = verdict.is_open
    if self.adaptive:
      verdict, is_final_W = self._judge_candidates(ctx, state, queries, verdict)
      final_W &= is_final_W
    state = rows_lib.commit(
        state, queries, verdict, verdict.is_open, final_W
    )
    return self._advance(ctx.model.grid, state)

  def _judge_candidates(
      self, ctx: Context, state: Rows, queries: Queries, verdict: Verdict
  ) -> tuple[Verdict, jax.Array]:
    """(verdict, bool [W] which cells are no mere candidates).

    Source: ZipAR, section 3.3.
    """
    grid = ctx.model.grid
    tested = rows_lib.judge(ctx, state, queries, verdict.p)
    row_W = state.lead + jnp.arange(len(verdict.cells))
    is_whole_H = rows_lib.fill(grid, state.final) == grid.cols
    is_free_W = (row_W == 0) | is_whole_H.at[row_W - 1].get(mode="clip")
    is_first_W = verdict.cells == row_W * grid.row_slots
    tokens_W = jnp.where(
        is_first_W & tested.had_draft, tested.tokens, verdict.tokens
    )
    return (
        verdict.replace(tokens=tokens_W),
        ~is_first_W | is_free_W | tested.passed,
    )

  def _advance(self, grid: Grid, state: Rows) -> Rows:
    """State with the next row begun if it is due."""
    row, rows = state.entered, state.first.shape[0]
    fill_H = rows_lib.fill(grid, state.final)
    lead = rows_lib.narrow_lead(grid, state)
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
    state = rows_lib.move(state, lead, fill_R - 1)
    return state.replace(entered=row + is_due)

  def _lag(self, grid: Grid) -> int:
    """Cells of the row above that a row needs."""
    least = 1 + int(grid.end_of_row)
    check(self.window >= least, "window", self.window,
          f">= {least} on this grid")
    return min(self.window + 1 - least, grid.cols)
