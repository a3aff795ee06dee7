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

from ssd_jax import sampling
from ssd_jax.config import check
from ssd_jax.decoding import acceptance, row_drafts, rows as rows_lib
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import Rows, Verdict
from ssd_jax.grid import Grid
from ssd_jax.types import Model, Queries

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

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """State with row 0 active."""
    grid = ctx.model.grid
    # A row that is done stays for the pass that feeds its last cell.
    rows = min(grid.rows, -(-grid.cols // self._context(grid)) + 1)
    first_R = jnp.full(rows, -1).at[0].set(0)
    width = min(self.window, grid.cols)
    state = rows_lib.start(ctx, p_V, hidden_GD, first_R, width)
    return self._advance(ctx, state)

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """Each active row's last final cell and its drafts."""
    return rows_lib.propose(ctx, state, self.row_causal)

  def resolve(
      self, ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Rows:
    """State with each active row's accepted drafts final, the rest redrawn."""
    del hidden_GQD
    grid = ctx.model.grid
    verdict = rows_lib.judge(ctx, state, queries, p_QV)
    final_W = verdict.is_open & self._accept(grid, state, verdict)
    noise_QV = jax.random.gumbel(ctx.pass_key(rows_lib.REFRESH), p_QV.shape)
    verdict = verdict.replace(tokens=jnp.where(
        final_W, verdict.tokens, sampling.sample(p_QV, noise_QV)
    ))
    at = jnp.where(final_W, verdict.cells, grid.length)
    fill_H = rows_lib.fill(grid, state.final.at[at].set(True, mode="drop"))
    row_W, col_W = _place(grid, verdict.cells)
    # The cell after the last draft is one itself, if there is room for it.
    redrawn_W = verdict.is_open & (
        final_W | (col_W < fill_H[row_W] + self._drafts(grid, fill_H)[row_W])
    )
    if self.keep:
      redrawn_W &= final_W | ~self._is_likely(state, verdict)
    state = rows_lib.commit(state, queries, verdict, redrawn_W, final_W)
    return self._advance(ctx, state)

  def _accept(self, grid: Grid, state: Rows, verdict: Verdict) -> jax.Array:
    """bool [W]: drafts before a row's first rejection; in the top row, that."""
    rows = state.first.shape[0]
    passed_RM = (verdict.had_draft & verdict.passed).reshape(rows, -1)
    run_R = jnp.sum(jnp.cumprod(passed_RM, axis=1), axis=1)
    is_whole_H = rows_lib.fill(grid, state.final) == grid.cols
    is_top_R = state.lead + jnp.arange(rows) == jnp.argmin(is_whole_H)
    count_R = run_R + is_top_R
    place_M = jnp.arange(passed_RM.shape[1])
    return (place_M < count_R[:, None]).reshape(-1)

  def _is_likely(self, state: Rows, verdict: Verdict) -> jax.Array:
    """bool [W]: drafts behind a row's first rejection that are worth keeping.

    The rejected one itself is never kept.
    """
    rows = state.first.shape[0]
    failed_RM = (~verdict.passed).reshape(rows, -1)
    earlier_RM = jnp.cumsum(failed_RM, axis=1) - failed_RM
    drafts_W = state.tokens.at[verdict.cells].get(mode="fill", fill_value=0)
    ratio = acceptance.at(verdict.p, drafts_W) > _KEEP * acceptance.at(
        state.q, drafts_W
    )
    return verdict.had_draft & ratio & (earlier_RM.reshape(-1) > 0)

  def _advance(self, ctx: Context, state: Rows) -> Rows:
    """State with the next row active if it is due, and windows topped up."""
    grid, row = ctx.model.grid, state.entered
    fill_H = rows_lib.fill(grid, state.final)
    lead = rows_lib.narrow_lead(grid, state)
    rows = state.first.shape[0]
    is_due = (
        (row < jnp.minimum(grid.rows, lead + rows))
        & (fill_H[row - 1] >= self._context(grid))
    )
    last = (row - 1) * grid.row_slots + fill_H[row - 1] - 1
    state = row_drafts.stand_in(grid, state, row, last, is_due)
    state = state.replace(entered=row + is_due)
    fill_R = fill_H.at[lead + jnp.arange(rows)].get(mode="clip")
    state = rows_lib.move(state, lead, fill_R - 1)
    return self._top_up(ctx, state, fill_H)

  def _top_up(self, ctx: Context, state: Rows, fill_H: jax.Array) -> Rows:
    """State with random drafts where a row has fewer than it may."""
    grid, vocab = ctx.model.grid, ctx.model.vocab
    row_W, col_W = rows_lib.predicted(state)
    inside_W = (row_W < state.entered) & (col_W < grid.cols)
    slots_W = jnp.where(inside_W, row_W * grid.row_slots + col_W, grid.length)
    end_H = fill_H + self._drafts(grid, fill_H)
    token_W = state.tokens.at[slots_W].get(mode="fill", fill_value=0)
    known_W = state.known.at[slots_W].get(mode="fill", fill_value=False)
    is_new_W = (
        inside_W & (col_W < end_H.at[row_W].get(mode="clip"))
        & ~(known_W & (acceptance.at(state.q, token_W) > 0))
    )
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

  def _drafts(self, grid: Grid, fill_H: jax.Array) -> jax.Array:
    """int32 [grid rows]: drafts that each row may hold.

    A pass looks at one cell more than that, up to the last final cell above.
    """
    above_H = jnp.concatenate([jnp.full(1, grid.cols), fill_H[:-1]])
    return jnp.clip(above_H - fill_H, 1, min(self.window, grid.cols)) - 1

  def _context(self, grid: Grid) -> int:
    return rows_lib.clamp(self, "context", grid.cols, "the columns")


def _place(grid: Grid, slots_W: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(row, column) of slots; of the last row beyond the image."""
  row_W = jnp.minimum(slots_W // grid.row_slots, grid.rows - 1)
  return row_W, slots_W - row_W * grid.row_slots
