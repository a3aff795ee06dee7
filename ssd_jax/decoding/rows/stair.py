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
import jax.scipy.special

from ssd_jax.core.config import UserError, check
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Model, Queries
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import (
  drafts as row_drafts,
  queries as row_queries,
  state as rows_lib,
)
from ssd_jax.decoding.rows.drafts import Fed
from ssd_jax.decoding.rows.state import Rows, Verdict

DRAFTS = ("auto", "heads", "above", "around", "copy", "both")
_NEED_HEADS = ("heads", "both")
_ROW_0, _ROW_BELOW = range(2)  # purposes of drafting
# By default; with two streams about as many rows of a product as accelerators
# take in the time in which they read the weights.
_MOST_QUERIES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Staircase:
  """What both staircases share.

  Attributes:
    entry: Final cells of a row at which the row below is drafted; 0 is as soon
      as it is drafted itself.
    rows: Rows in flight.
    queries: Slots fed in a pass, the first of those that have something to say;
      None is as many as five rows have (`Exact`: one row), 256 at most.
    drafts: Where a row's first drafts come from: "heads" (horizontal in row 0,
      vertical below), "above" (the distribution of the cell above; in row 0 of
      cell 0), "around" (those of the three cells above, blurred), "copy" (the
      token above), "both" (heads and above, averaged) or "auto" (heads where
      there are any, else above).
    coupled: Draw each cell with its own noise in every pass, AR's, instead of
      testing by min(1, p / q) with the noise of the pass.
  """

  entry: int = 1
  rows: int = 4
  queries: int | None = None
  drafts: str = "auto"
  coupled: bool = False

  default_rows = 1  # whose slots a pass feeds where `queries` is None
  row_causal = False
  sure = 0.0

  def __post_init__(self):
    check(self.entry >= 0, "entry", self.entry, ">= 0")
    check(self.rows >= 1, "rows", self.rows, ">= 1")
    check(self.queries is None or self.queries >= 1, "queries", self.queries,
          ">= 1")
    check(self.drafts in DRAFTS, "drafts", self.drafts,
          f"one of {', '.join(DRAFTS)}")

  def scratch(self, model: Model) -> int:
    """None."""
    return 0

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """State with row 0 drafted."""
    grid = ctx.model.grid
    if self.drafts in _NEED_HEADS and min(ctx.model.heads) < 1:
      raise UserError(
          f"got drafts={self.drafts} for a model without spatial heads, "
          "expected them at hand; train them, or use drafts=above"
      )
    rows = min(self.rows, grid.rows)
    state = rows_lib.start(ctx, p_V, hidden_GD, rows, grid.cols)
    state = self._draft_row_0(ctx, state, p_V)
    if grid.cols > 1:
      return state
    return self._advance(ctx, state, row_drafts.no_pass(grid, hidden_GD))

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """What is open in the rows in flight."""
    grid = ctx.model.grid
    needed_N = self._needed(ctx.model, state)
    return row_queries.propose(
        ctx, state, needed_N, self._size(grid), self.row_causal
    )

  def resolve(
      self, ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Rows:
    """State with every draft tested and each row's next cells final."""
    grid = ctx.model.grid
    # What heads say is near the model's law; copies of the row above are not,
    # and if they passed leniently, pictures would run flat.
    verdict = rows_lib.verify(
        ctx, state, queries, p_QV, self.coupled, self._lenience(grid),
        eager=self._uses_heads(ctx.model))
    final_Q = self._accepted_prefix(grid, state, verdict)
    state = rows_lib.commit(
        state, queries, verdict, verdict.had_draft, final_Q
    )
    return self._advance(ctx, state, (queries.slots, hidden_GQD))

  def _lookahead(self, cols: int) -> int:
    raise NotImplementedError

  def _lenience(self, grid: Grid) -> float:
    """What a draft's q is multiplied by when it is tested."""
    return 1.0

  def _size(self, grid: Grid) -> int:
    most = min(self.rows, grid.rows) * grid.row_slots
    wanted = self.queries or min(
        self.default_rows * grid.row_slots, _MOST_QUERIES)
    return min(max(wanted, 1 + int(grid.end_of_row)), most)

  def _needed(self, model: Model, state: Rows) -> jax.Array:
    """bool [N]: slots to feed.

    Heads want the whole of the row that they look at, if there is room: what is
    open goes first, or rows would stand still.
    """
    grid = model.grid
    open_N = row_queries.open_rows(grid, state)
    if not self._uses_heads(model):
      return open_N
    row_N, _ = rows_lib.place(grid, jnp.arange(grid.length) + 1)
    is_source_N = (row_N == state.entered - 1) & (state.entered < grid.rows)
    wanted_N = open_N | (is_source_N & row_queries.whole_rows(grid, state))
    has_room = jnp.sum(wanted_N) <= self._size(grid)
    return jnp.where(has_room, wanted_N, open_N)

  def _accepted_prefix(
    self, grid: Grid, state: Rows, verdict: Verdict
  ) -> jax.Array:
    """bool [Q]: cells that become final.

    In a row whose first n cells are final or passed, cell n was redrawn in
    their company, so n + 1 may become final, but only n were fed as such: only
    those count for the row below.
    """
    row_Q, col_Q = rows_lib.place(grid, verdict.cells)
    rows = state.first.shape[0]
    row_R = jnp.minimum(state.lead + jnp.arange(rows), grid.rows - 1)
    fill_R = rows_lib.prefix(grid, state.final)[row_R]
    run_R = rows_lib.accepted_prefix(grid, state, verdict)[row_R]
    ahead_RC = jnp.full((rows, grid.cols), self._lookahead(grid.cols))
    if self.sure:
      entropy_Q = jnp.sum(jax.scipy.special.entr(verdict.p), axis=-1)
      is_sure_Q = verdict.is_open & (entropy_Q <= self.sure)
      at_Q = jnp.where(is_sure_Q, row_Q - state.lead, rows)
      ahead_RC = ahead_RC.at[at_Q, col_Q].set(0, mode="drop")
    # Cells that were drafts in the pass are hidden from other rows, or not.
    fed_R = fill_R if self.row_causal else run_R
    count_R = allow(fill_R, run_R, fed_R, ahead_RC)
    at_Q = jnp.clip(row_Q - state.lead, 0, rows - 1)
    return verdict.is_open & (col_Q < count_R[at_Q])

  def _uses_heads(self, model: Model) -> bool:
    return self.drafts in ("auto", *_NEED_HEADS) and min(model.heads) >= 1

  def _draft_row_0(self, ctx: Context, state: Rows, p_V: jax.Array) -> Rows:
    """State with the cells right of cell 0 drafted from what predicted it."""
    cols_K = jnp.arange(1, ctx.model.grid.cols)
    q_KV = jnp.broadcast_to(p_V, (cols_K.shape[0], p_V.shape[0]))
    if self._uses_heads(ctx.model) and cols_K.shape[0]:
      source = jnp.zeros(1, jnp.int32), state.hidden[:, None]
      reach = min(ctx.model.heads[0], cols_K.shape[0])
      heads = [
          row_drafts.spread(
              ctx, state, "horizontal", offset, source, jnp.bool_(True))
          for offset in range(1, reach + 1)
      ]
      # Beyond the furthest head, its guess is as good as any.
      q_KV = jnp.concatenate(heads)[jnp.minimum(cols_K, reach) - 1]
    drafts = row_drafts.sample_drafts(ctx, q_KV, cols_K, self._how(), _ROW_0)
    index_K = rows_lib.window_index(state, jnp.int32(0), cols_K)
    return row_drafts.put_drafts(
        state, cols_K, index_K, drafts, jnp.bool_(True)
    )

  def _advance(self, ctx: Context, state: Rows, fed: Fed) -> Rows:
    """State with the window moved on and the next row drafted if it is due."""
    grid = ctx.model.grid
    entry = rows_lib.clamp(self, "entry", grid.cols, "the columns")
    row, cols_C = state.entered, jnp.arange(grid.cols)
    above_C = jnp.asarray(grid.slot_of)[row - 1]
    lead = rows_lib.first_open(grid, state.final)
    moved = rows_lib.shift_window(state, lead, state.first)
    needed = jnp.sum(row_queries.open_rows(grid, moved))
    is_due = (
        (row < grid.rows) & (row < lead + state.first.shape[0])
        & (jnp.sum(state.final[above_C]) >= entry)
        & (needed < self._size(grid))
    )
    q_CV = self._guess(ctx, state, fed, above_C, is_due)
    slots_C = above_C + grid.row_slots
    drafts = row_drafts.sample_drafts(
      ctx, q_CV, slots_C, self._how(), _ROW_BELOW
    )
    index_C = rows_lib.window_index(moved, row, cols_C)
    moved = row_drafts.put_drafts(moved, slots_C, index_C, drafts, is_due)
    return moved.replace(entered=row + is_due)

  def _guess(
      self, ctx: Context, state: Rows, fed: Fed, above_C: jax.Array,
      is_due: jax.Array,
  ) -> jax.Array:
    """float32 [C, V]: what the row below a row is drafted from, if it is."""
    place = rows_lib.place(ctx.model.grid, above_C)
    q_CV = state.q[rows_lib.window_index(state, *place)]
    if self.drafts == "copy":
      return jax.nn.one_hot(state.tokens[above_C], ctx.model.vocab)
    if self.drafts == "around":
      padded = jnp.concatenate([q_CV[:1], q_CV, q_CV[-1:]])
      return (padded[:-2] + 2 * q_CV + padded[2:]) / 4
    if not self._uses_heads(ctx.model):
      return q_CV
    hidden_GCD, is_fed_C = row_drafts.predictors(state, fed, above_C)
    heads_CV = row_drafts.spread(
        ctx, state, "vertical", 1, (above_C, hidden_GCD), is_due
    )
    if self.drafts == "both":
      heads_CV = (heads_CV + q_CV) / 2
    return jnp.where(is_fed_C[:, None], heads_CV, q_CV)

  def _how(self) -> str:
    return "coupled" if self.coupled else "sample"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stair(_Staircase):
  """Cell by cell, `lookahead` cells behind the row above.

  Without settings it is the best trade-off that was measured (docs/results.md).

  Attributes:
    lookahead: Final cells of the row above right of, and including, the one
      above; from the number of columns on, the output's law is AR's. None is 4,
      or fewer than the columns.
    sure: Entropy in nats up to which a cell needs none of these, but only those
      to the left of the one above.
    lenience: What a draft's q is multiplied by when it is tested: below 1 more
      drafts pass than the model would have it (Leviathan et al. 2023,
      arXiv:2211.17192, appendix A.5). A cell's first test is strict unless
      heads drafted it. None is 0.6, and 1 where nothing else keeps the law
      from being AR's.
    row_causal: Hide the drafts of other rows (PJD's mask).
  """

  entry: int = 0
  rows: int = 6
  lookahead: int | None = None
  sure: float = 0.0
  lenience: float | None = None
  row_causal: bool = False
  default_rows = 5
  name = "stair"
  lossless = False

  def __post_init__(self):
    super().__post_init__()
    check(self.lookahead is None or self.lookahead >= 0, "lookahead",
          self.lookahead, ">= 0")
    check(self.sure >= 0, "sure", self.sure, ">= 0")
    check(self.lenience is None or 0 < self.lenience <= 1, "lenience",
          self.lenience, "in (0, 1]")
    check(self.lenience in (None, 1) or not self.coupled, "lenience",
          self.lenience, "1 with coupled=true, which tests no drafts")

  def lossless_on(self, grid: Grid) -> bool:
    """Whether rows wait for the whole of the row above, and tests are AR's."""
    return self._waits(grid) and self._lenience(grid) == 1

  def _waits(self, grid: Grid) -> bool:
    is_whole = self._lookahead(grid.cols) == grid.cols and not self.sure
    return grid.rows == 1 or is_whole

  def _lookahead(self, cols: int) -> int:
    if self.lookahead is None:
      return max(min(4, cols - 1), 1)
    return min(self.lookahead, cols)

  def _lenience(self, grid: Grid) -> float:
    if self.lenience is not None:
      return self.lenience
    return 1.0 if self.coupled or self._waits(grid) else 0.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(_Staircase):
  """The raster prefix that passed and the first redrawn cell; lossless.

  It feeds as many slots as a row has: three times as many save one pass in ten,
  and a pass of the embedded model on a CPU takes 1.7 times as long.

  Attributes:
    lookahead: Final cells of the row above; None is all of them, and fewer
      would not be exact.
  """

  rows: int = 3
  lookahead: int | None = None
  default_rows = 1
  name = "exact"
  lossless = True

  def _lookahead(self, cols: int) -> int:
    if self.lookahead is not None and self.lookahead < cols:
      raise UserError(
          f"got lookahead={self.lookahead}, expected at least {cols} (the "
          "columns) for exact; leave it out, or use stair"
      )
    return cols

def allow(
    fill_R: jax.Array, run_R: jax.Array, fed_R: jax.Array, ahead_RC: jax.Array
) -> jax.Array:
  """int32 [R]: cells of each row that are final after a pass.

  Args:
    fill_R: int32, cells that were final before it.
    run_R: int32, leading cells that are final or passed.
    fed_R: int32, those of them that the rows below saw.
    ahead_RC: int32, cells that the row above has to be ahead of each cell.
  """
  cols = ahead_RC.shape[1]
  col_C = jnp.arange(cols)

  def step(above, row):
    fill, run, fed, ahead_C = row
    is_allowed_C = (
        (above >= jnp.minimum(col_C + ahead_C, cols)) | (col_C < fill)
    )
    allowed = jnp.sum(jnp.cumprod(is_allowed_C.astype(jnp.int32)))
    return jnp.minimum(fed, allowed), jnp.minimum(run + 1, allowed)

  _, count_R = jax.lax.scan(
      step, jnp.int32(cols), (fill_R, run_R, fed_R, ahead_RC)
  )
  return count_R
