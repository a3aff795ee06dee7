"""PJD: a window of Jacobi drafts in each of several rows, without training.

A row becomes active once the row above has `context` final tokens. Each active
row drafts a few tokens beyond its final ones, is verified independently from
left to right, and commits its accepted prefix. The top row also commits the
resampled first rejected draft; in other rows, this draft and all later ones are
drafted anew. No row overtakes the row above.

Source: Parallel Jacobi Decoding, arXiv:2606.05703, algorithm 1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ssd_jax.core.config import check
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import DecoderBase
from ssd_jax.core.types import Queries
from ssd_jax.decoding import acceptance, sampling
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import (
  drafts as row_drafts,
  queries as row_queries,
  state as rows_lib,
)
from ssd_jax.decoding.rows.state import Rows, Verdict

_CONTEXT = 4  # default of `context`
_KEEP = 0.5  # lowest acceptance probability of a draft that `keep` keeps


@dataclasses.dataclass(frozen=True)
class PJD(DecoderBase):
  """Parallel Jacobi decoding.

  Attributes:
    context: Number of final tokens of a row at which the row below becomes
      active; None is 4, or the columns of a narrower grid. (The published code
      also counts the token before the row.)
    window: Tokens of a row that a pass predicts: its drafts and one more.
    row_causal: Whether to hide the drafts of other rows.
    keep: Whether to keep drafts after the first rejection, with their q, if
      their acceptance probability is above one half, as the published code
      does. Otherwise all of them are sampled anew.
  """

  context: int | None = None
  window: int = 8
  row_causal: bool = True
  keep: bool = False

  name = "pjd"
  lossless = False

  def __post_init__(self):
    check(self.context is None or self.context >= 1, "context", self.context,
          ">= 1")
    check(self.window >= 1, "window", self.window, ">= 1")

  def is_lossless(self, grid: Grid) -> bool:
    """Returns whether rows wait for the whole row above, so one is active."""
    is_alone = grid.rows == 1 or self._context(grid) == grid.cols
    return is_alone and not self.keep

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """Returns the state with row 0 active."""
    grid = ctx.model.grid
    rows = min(grid.rows, -(-grid.cols // self._context(grid)) + 1)
    width = min(self.window, grid.cols)
    return self._advance(ctx, rows_lib.start(ctx, p_V, hidden_GD, rows, width))

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """Returns each active row's last final token and its drafts.

    A row's window ends at the last final token of the row above, so all windows
    together are no longer than a row. In addition, the last token of a complete
    row may have to be fed.
    """
    grid = ctx.model.grid
    fill_H = rows_lib.prefix(grid, state.final)
    count_H = self._window(grid, fill_H)
    row_H = jnp.arange(grid.rows)
    # A window of one token has no draft; only the top row generates without.
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
    """Commits each active row's accepted prefix and resamples the rest."""
    del hidden_GQD
    grid = ctx.model.grid
    verdict = rows_lib.verify(ctx, state, queries.slots, p_QV)
    row_Q, col_Q = rows_lib.row_and_column(grid, verdict.slots)
    prefix_H = rows_lib.accepted_prefix(grid, state, verdict)
    is_top_H = jnp.arange(grid.rows) == state.lead
    final_Q = verdict.is_open & (col_Q < (prefix_H + is_top_H)[row_Q])
    fresh_Q = sampling.sample_inverse(p_QV, ctx.pass_key(rows_lib.REFRESH))
    verdict = verdict.replace(
        tokens=jnp.where(final_Q, verdict.tokens, fresh_Q))
    at_Q = jnp.where(final_Q, verdict.slots, grid.length)
    fill_H = rows_lib.prefix(grid, state.final.at[at_Q].set(True, mode="drop"))
    # The token after the last draft becomes a draft if the window has room.
    end_H = fill_H + self._num_drafts(grid, fill_H)
    written_Q = verdict.is_open & (final_Q | (col_Q < end_H[row_Q]))
    if self.keep:
      # The first rejected draft itself is never kept.
      is_behind_Q = col_Q > prefix_H[row_Q]
      written_Q &= final_Q | ~(is_behind_Q & self._is_likely(state, verdict))
    state = rows_lib.commit(state, queries, verdict, written_Q, final_Q)
    return self._advance(ctx, state)

  def _is_likely(self, state: Rows, verdict: Verdict) -> jax.Array:
    """Returns drafts whose acceptance probability exceeds 0.5, bool [Q]."""
    drafts_Q = state.tokens.at[verdict.slots].get(mode="fill", fill_value=0)
    q_QV = state.q.at[verdict.index].get(mode="fill", fill_value=0.0)
    return verdict.had_draft & (
        acceptance.at(verdict.p, drafts_Q)
        > _KEEP * acceptance.at(q_QV, drafts_Q)
    )

  def _advance(self, ctx: Context, state: Rows) -> Rows:
    """Activates the next row if it is due, and fills the windows."""
    grid, row = ctx.model.grid, state.entered
    fill_H = rows_lib.prefix(grid, state.final)
    lead = rows_lib.first_open_row(grid, state.final)
    rows = state.first.shape[0]
    is_due = (
        (row < jnp.minimum(grid.rows, lead + rows))
        & (fill_H[row - 1] >= self._context(grid))
    )
    last = (row - 1) * grid.row_slots + fill_H[row - 1] - 1
    state = row_drafts.put_placeholder(grid, state, row, last, is_due)
    state = state.replace(entered=row + is_due)
    fill_R = fill_H.at[lead + jnp.arange(rows)].get(mode="clip")
    state = rows_lib.shift_window(state, lead, fill_R)
    return self._fill_windows(ctx, state, fill_H)

  def _fill_windows(
      self, ctx: Context, state: Rows, fill_H: jax.Array
  ) -> Rows:
    """Adds random drafts to rows whose windows are not full."""
    grid, vocab = ctx.model.grid, ctx.model.vocab
    row_W, col_W = rows_lib.window(state)
    end_H = fill_H + self._num_drafts(grid, fill_H)
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
    # A placeholder of the row below becomes a draft of this row.
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
    """Returns how many tokens of each row a pass may predict, int32 [H].

    The window ends at the last final token of the row above.
    """
    above_H = jnp.concatenate([jnp.full(1, grid.cols), fill_H[:-1]])
    return jnp.clip(above_H - fill_H, 0, min(self.window, grid.cols))

  def _num_drafts(self, grid: Grid, fill_H: jax.Array) -> jax.Array:
    """Returns how many drafts each row may hold, int32 [H]: its window - 1."""
    return jnp.maximum(self._window(grid, fill_H) - 1, 0)

  def _context(self, grid: Grid) -> int:
    return rows_lib.at_most(
        self.context, _CONTEXT, grid.cols, "context", "the columns")
