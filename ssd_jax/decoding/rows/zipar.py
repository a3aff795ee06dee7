"""ZipAR: one token per row and pass; rows start behind the row above.

Nothing is drafted or verified except, with the adaptive window, the first token
of a row. A token never sees tokens that are generated later in the rows above.

Source: ZipAR, arXiv:2412.04062.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ssd_jax.core.config import check
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import DecoderBase
from ssd_jax.core.types import Queries
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import (
  drafts as row_drafts,
  queries as row_queries,
  state as rows_lib,
)
from ssd_jax.decoding.rows.state import Rows, Verdict


@dataclasses.dataclass(frozen=True)
class ZipAR(DecoderBase):
  """Starts a row when the row above has `window` tokens.

  On grids with end-of-row tokens, the end-of-row token before a row counts as
  its first token. On other grids, row 1 waits for all of row 0; a row that
  starts before the row above ends sees the latest token of the row two above
  in place of the missing last token of the row above.

  Attributes:
    window: Tokens of the row above that a row needs; as many as a row has
      give AR.
    adaptive: Whether a row's first token is only a candidate. As the window
      grows it is tested again, accepted with probability min(1, p' / p), where
      p is the distribution it was sampled from, and otherwise resampled from
      the residual of p'. The row starts once the candidate is accepted or the
      row above is complete.
  """

  window: int = 8
  adaptive: bool = False

  name = "zipar"
  lossless = False

  def __post_init__(self):
    check(self.window >= 1, "window", self.window, ">= 1")

  def is_lossless(self, grid: Grid) -> bool:
    """Returns whether rows wait for the whole row above, which is AR."""
    return grid.rows == 1 or self._lag(grid) == grid.cols

  @property
  def has_fixed_passes(self) -> bool:
    """Whether all images of a grid take the same number of passes."""
    return not self.adaptive

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """Returns the state with token 0 final."""
    grid = ctx.model.grid
    rows = min(-(-grid.cols // self._lag(grid)), grid.rows)
    state = rows_lib.start(ctx, p_V, hidden_GD, rows, 1)
    return self._advance(grid, state)

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """Returns the last token of every active row.

    A completed row's last token is fed together with the rows below it, each
    of which is at least one lag behind the row above.
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
    """Returns the state with one more token in every active row."""
    del hidden_GQD
    verdict = rows_lib.verify(ctx, state, queries.slots, p_QV, coupled=True)
    final_Q = verdict.is_open
    if self.adaptive:
      verdict, is_final_Q = self._test_candidates(ctx, state, queries, verdict)
      final_Q &= is_final_Q
    state = rows_lib.commit(
        state, queries, verdict, verdict.is_open, final_Q
    )
    return self._advance(ctx.model.grid, state)

  def _test_candidates(
      self, ctx: Context, state: Rows, queries: Queries, verdict: Verdict
  ) -> tuple[Verdict, jax.Array]:
    """Tests the candidates, the first tokens of rows.

    Returns:
      The verdict, and which slots are not, or no longer, candidates, bool [Q].

    Source: ZipAR, section 3.3.
    """
    grid = ctx.model.grid
    tested = rows_lib.verify(ctx, state, queries.slots, verdict.p)
    row_Q, col_Q = rows_lib.row_and_column(grid, verdict.slots)
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
    """Starts the next row if it is due, and shifts the window."""
    row, rows = state.entered, state.first.shape[0]
    fill_H = rows_lib.prefix(grid, state.final)
    lead = rows_lib.first_open_row(grid, state.final)
    is_row_1 = (row == 1) & (not grid.end_of_row)
    needed = jnp.where(is_row_1, grid.cols, self._lag(grid))
    is_due = (
        (row < jnp.minimum(grid.rows, lead + rows))
        & (fill_H[row - 1] >= needed)
    )
    # The row above lacks its last token; the row two above is further ahead.
    source = (row - 2) * grid.row_slots + fill_H[row - 2] - 1
    state = row_drafts.put_placeholder(grid, state, row, source, is_due)
    fill_R = fill_H.at[lead + jnp.arange(rows)].get(mode="clip")
    state = rows_lib.shift_window(state, lead, fill_R)
    return state.replace(entered=row + is_due)

  def _lag(self, grid: Grid) -> int:
    """Returns how many image tokens of the row above a row needs."""
    least = 1 + int(grid.end_of_row)
    check(self.window >= least, "window", self.window,
          f">= {least} on this grid")
    return min(self.window + 1 - least, grid.cols)
