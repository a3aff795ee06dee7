"""Selects the slots that a pass feeds, and which slots they see.

Slots are fed in raster order, up to a static number of queries; the last slots
are left out if there are too many, so that all slots before a query have been
fed. A slot that was never fed is never visible.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Queries
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows.state import Rows, prefix, row_and_column


def propose(
    ctx: Context, state: Rows, needed_N: jax.Array, size: int,
    row_causal: bool = False,
) -> Queries:
  """Returns queries for slots that hold tokens; each sees the slots before it.

  Args:
    ctx: Context of the pass.
    state: State of the image.
    needed_N: bool, slots to feed; the first ones if there are too many.
    size: Number of queries Q.
    row_causal: Whether to hide drafts of other rows (PJD, section 3.3). The
      slot before a row belongs to that row.
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
  """Returns the slots that predict any position of the active rows, bool [N].

  Positions that are final are included.
  """
  return _entered(grid, state) & (_predicts(grid) >= state.lead)


def open_rows(grid: Grid, state: Rows) -> jax.Array:
  """Returns slots that predict open positions or hold unfed final tokens.

  Returns:
    bool [N].
  """
  is_last_N = jnp.append(state.final[1:], True)
  return _entered(grid, state) & ~(state.settled & is_last_N)


def _entered(grid: Grid, state: Rows) -> jax.Array:
  return _predicts(grid) < state.entered


def _predicts(grid: Grid) -> jax.Array:
  """Returns the row that each slot is needed for, int32 [N].

  This is the slot's own row, but the next one for a row's last image token on
  plain grids and for the forced slot on end-of-row grids.
  """
  behind = grid.row_slots - grid.cols + 1
  rows_N = (np.arange(grid.length) + behind) // grid.row_slots
  return jnp.asarray(rows_N, jnp.int32)


def frontier(grid: Grid, state: Rows, count_H: jax.Array) -> jax.Array:
  """Returns slots that predict each row's next positions, or are not yet fed.

  Args:
    grid: The image as a sequence.
    state: State of the image.
    count_H: int32 [grid rows], positions to predict after the final ones of
      each row.

  Returns:
    bool [N]; includes image tokens that are final but not yet fed.
  """
  row_N, col_N = row_and_column(grid, jnp.arange(grid.length) + 1)
  ahead_N = col_N - prefix(grid, state.final)[row_N]
  is_predictor_N = (
      (ahead_N >= 0) & (ahead_N < count_H[row_N]) & (col_N < grid.cols)
  )
  is_image_N = ~jnp.asarray(grid.is_forced)
  return is_predictor_N | (is_image_N & state.final & ~state.settled)
