"""The staircase: rows in flight that become final cell by cell.

All rows are drafted, tested and redrawn in every pass, each seeing all drafts
before it. A cell becomes final once its own row is final up to it, the row
above is final (and fed as such) `lookahead` cells further, and it was tested or
redrawn in that state. With the whole row above, that is the raster prefix and
its first redrawn cell: `Exact`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ssd_jax.config import UserError, check
from ssd_jax.decoding import row_drafts, rows as rows_lib
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import Rows, Verdict
from ssd_jax.grid import Grid
from ssd_jax.types import Model, Queries

DRAFTS = ("auto", "heads", "above")
_ROW_0, _ROW_BELOW = range(2)  # purposes of drafting


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Staircase:
  """What both staircases share.

  Attributes:
    entry: Final cells of a row at which the row below is drafted.
    rows: Rows in flight.
    drafts: Where a row's first drafts come from: "heads" (horizontal in row 0,
      vertical below), "above" (the distributions of the cells above, and of
      cell 0 in row 0) or "auto" (heads where there are any).
    coupled: Draw each cell with its own noise in every pass, AR's, instead of
      testing by min(1, p / q) with the noise of the pass.
  """

  entry: int = 1
  rows: int = 4
  drafts: str = "auto"
  coupled: bool = False

  def __post_init__(self):
    check(self.entry >= 1, "entry", self.entry, ">= 1")
    check(self.rows >= 1, "rows", self.rows, ">= 1")
    check(self.drafts in DRAFTS, "drafts", self.drafts,
          f"one of {', '.join(DRAFTS)}")

  def scratch(self, model: Model) -> int:
    """None."""
    return 0

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """State with row 0 drafted."""
    grid = ctx.model.grid
    if self.drafts == "heads" and min(ctx.model.heads) < 1:
      raise UserError(
          "got drafts=heads for a model without spatial heads, expected them "
          "at hand; train them, or use drafts=above"
      )
    first_R, width = rows_lib.full_window(grid, min(self.rows, grid.rows))
    state = rows_lib.start(ctx, p_V, hidden_GD, first_R, width)
    state = self._draft_row_0(ctx, state, p_V)
    if grid.cols > 1:
      return state
    shape = (hidden_GD.shape[0], len(state.q), hidden_GD.shape[1])
    return self._advance(ctx, state, jnp.zeros(shape, hidden_GD.dtype))

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """Every token of the rows in flight."""
    return rows_lib.propose(ctx, state, getattr(self, "row_causal", False))

  def resolve(
      self, ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Rows:
    """State with every draft tested and each row's next cells final."""
    verdict = rows_lib.judge(ctx, state, queries, p_QV, self.coupled)
    above = self._lookahead(ctx.model.grid.cols)
    final_W = verdict.is_open & climb(verdict, ctx.model.grid, above)
    state = rows_lib.commit(
        state, queries, verdict, verdict.had_draft, final_W
    )
    return self._advance(ctx, state, hidden_GQD)

  def _lookahead(self, cols: int) -> int:
    raise NotImplementedError

  def _uses_heads(self, model: Model) -> bool:
    return self.drafts != "above" and min(model.heads) >= 1

  def _draft_row_0(self, ctx: Context, state: Rows, p_V: jax.Array) -> Rows:
    """State with the cells right of cell 0 drafted from what predicted it."""
    cols_K = jnp.arange(1, ctx.model.grid.cols)
    q_KV = jnp.broadcast_to(p_V, (cols_K.shape[0], p_V.shape[0]))
    if self._uses_heads(ctx.model) and cols_K.shape[0]:
      source = jnp.zeros(1, jnp.int32), state.hidden[:, None]
      reach = min(ctx.model.heads[0], cols_K.shape[0])
      heads = [
          row_drafts.spread(ctx, state, "horizontal", offset, source)
          for offset in range(1, reach + 1)
      ]
      # Beyond the furthest head, its guess is as good as any.
      q_KV = jnp.concatenate(heads)[jnp.minimum(cols_K, reach) - 1]
    drafts = row_drafts.draw(ctx, q_KV, cols_K, self._how(), _ROW_0)
    index_K = rows_lib.window_index(state, jnp.int32(0), cols_K)
    return row_drafts.put_drafts(
        state, cols_K, index_K, drafts, jnp.bool_(True)
    )

  def _advance(
      self, ctx: Context, state: Rows, hidden_GWD: jax.Array
  ) -> Rows:
    """State with the window moved on and the next row drafted if it is due."""
    grid = ctx.model.grid
    entry = rows_lib.clamp(self, "entry", grid.cols, "the columns")
    cells_RC = jnp.asarray(grid.slot_of)
    row, cols_C = state.entered, jnp.arange(grid.cols)
    above_C = cells_RC[row - 1]
    moved = rows_lib.move(state, rows_lib.full_lead(grid, state), state.first)
    is_due = (
        (row < grid.rows) & (row < moved.lead + state.first.shape[0])
        & (jnp.sum(state.final[above_C]) >= entry)
    )
    if self._uses_heads(ctx.model):
      hidden_GCD = row_drafts.predictors(state, hidden_GWD, row - 1, cols_C)
      q_CV = row_drafts.spread(ctx, state, "vertical", 1, (above_C, hidden_GCD))
    else:
      q_CV = state.q[rows_lib.window_index(state, row - 1, cols_C)]
    slots_C = above_C + grid.row_slots
    drafts = row_drafts.draw(ctx, q_CV, slots_C, self._how(), _ROW_BELOW)
    index_C = rows_lib.window_index(moved, row, cols_C)
    moved = row_drafts.put_drafts(moved, slots_C, index_C, drafts, is_due)
    return moved.replace(entered=row + is_due)

  def _how(self) -> str:
    return "coupled" if self.coupled else "sample"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stair(_Staircase):
  """Cell by cell, `lookahead` cells behind the row above.

  Attributes:
    lookahead: Final cells of the row above right of, and including, the one
      above; from the number of columns on, the output's law is AR's.
    row_causal: Hide the drafts of other rows (PJD's mask).
  """

  lookahead: int = 2
  row_causal: bool = False
  name = "stair"
  lossless = False

  def __post_init__(self):
    super().__post_init__()
    check(self.lookahead >= 0, "lookahead", self.lookahead, ">= 0")

  def _lookahead(self, cols: int) -> int:
    return self.lookahead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(_Staircase):
  """The raster prefix that passed and the first redrawn cell; lossless.

  Attributes:
    lookahead: Final cells of the row above; None is all of them, and fewer
      would not be exact.
  """

  rows: int = 3
  lookahead: int | None = None
  name = "exact"
  lossless = True

  def _lookahead(self, cols: int) -> int:
    if self.lookahead is not None and self.lookahead < cols:
      raise UserError(
          f"got lookahead={self.lookahead}, expected at least {cols} (the "
          "columns) for exact; leave it out, or use stair"
      )
    return cols


def climb(verdict: Verdict, grid: Grid, lookahead: int) -> jax.Array:
  """bool [W]: cells that the rows above them allow to become final.

  In a row whose first n cells are final or passed, cell n was redrawn in their
  company, so n + 1 may become final, but only n were fed as such: only those
  count for the row below.
  """
  cols = grid.cols
  good_RM = (~verdict.is_open | verdict.passed).reshape(-1, grid.row_slots)
  run_R = jnp.sum(jnp.cumprod(good_RM[:, -cols:], axis=1), axis=1)

  def step(above, run):
    allowed = jnp.where(
        above >= cols, cols, jnp.clip(above - lookahead + 1, 0, cols)
    )
    return jnp.minimum(run, allowed), jnp.minimum(run + 1, allowed)

  _, count_R = jax.lax.scan(step, jnp.asarray(cols, run_R.dtype), run_R)
  col_M = jnp.arange(grid.row_slots) - (grid.row_slots - cols)
  return (col_M < count_R[:, None]).reshape(-1)
