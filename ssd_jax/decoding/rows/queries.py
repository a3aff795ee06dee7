"""Which slots a pass over rows in flight feeds, and what they see.

They go in raster order into a static number of queries; where these run out,
the last slots are left out, so that what stands before a query has been fed.
A slot that was never fed is never visible.
"""

import jax
import jax.numpy as jnp

from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Queries
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows.state import Rows, place, prefix


def propose(
    ctx: Context, state: Rows, needed_N: jax.Array, size: int,
    row_causal: bool = False,
) -> Queries:
  """Slots that hold tokens, each seeing what stands before it.

  Args:
    ctx: Of the pass.
    state: Of the image.
    needed_N: bool, slots to feed; the first of them, if there are too many.
    size: Queries Q.
    row_causal: Hide drafts of other rows (PJD, section 3.3). The slot before
      a row counts as that row's.
  """
  grid = ctx.model.grid
  all_N = jnp.arange(grid.length)
  slots_Q = jnp.nonzero(
      needed_N & state.known, size=size, fill_value=grid.length
  )[0].astype(jnp.int32)
  written_N = state.written.at[slots_Q].set(True, mode="drop")
  visible_QN = (all_N <= slots_Q[:, None]) & written_N
  if row_causal:
    owner = lambda slots: (slots + 1) // grid.row_slots
    visible_QN &= state.final | (owner(all_N) == owner(slots_Q)[:, None])
  positions_Q = jnp.minimum(slots_Q, grid.length - 1)
  return Queries(state.tokens[positions_Q], positions_Q, slots_Q, visible_QN)


def whole_rows(grid: Grid, state: Rows) -> jax.Array:
  """bool [N]: what predicts any cell of the rows in flight, final or not."""
  return _entered(grid, state) & (_predicts(grid) >= state.lead)


def open_rows(grid: Grid, state: Rows) -> jax.Array:
  """bool [N]: what predicts their open cells, and final tokens not yet fed."""
  is_last_N = jnp.append(state.final[1:], True)
  return _entered(grid, state) & ~(state.settled & is_last_N)


def _entered(grid: Grid, state: Rows) -> jax.Array:
  return _predicts(grid) < state.entered


def _predicts(grid: Grid) -> jax.Array:
  """int32 [N]: the row that each slot is needed for.

  Its own or, where it is a row's last cell or the forced slot behind, the next.
  """
  behind = grid.row_slots - grid.cols + 1
  return (jnp.arange(grid.length) + behind) // grid.row_slots


def frontier(grid: Grid, state: Rows, count_H: jax.Array) -> jax.Array:
  """bool [N]: what predicts the next cells of each row, and tokens not yet fed.

  Args:
    grid: Of the image.
    state: Of the image.
    count_H: int32 [grid rows], cells after the final ones of each row.
  """
  row_N, col_N = place(grid, jnp.arange(grid.length) + 1)
  ahead_N = col_N - prefix(grid, state.final)[row_N]
  is_looked_at_N = (
      (ahead_N >= 0) & (ahead_N < count_H[row_N]) & (col_N < grid.cols)
  )
  is_cell_N = ~jnp.asarray(grid.is_forced)
  return is_looked_at_N | (is_cell_N & state.final & ~state.settled)
