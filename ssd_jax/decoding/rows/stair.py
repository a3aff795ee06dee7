"""The staircase: several rows become final token by token, in parallel.

Every pass tests the drafts of all active rows and resamples the rejected ones;
each token sees all drafts before it. A token becomes final once its own row is
final up to it, the row above is final (and was fed so) `lookahead` positions
further, and the token was tested or resampled in that state. If the lookahead
is the whole row above, these are the accepted raster prefix and the first
resampled token: `Exact`.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.scipy.special

from ssd_jax.core.config import UserError, check
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import DecoderBase, Needs
from ssd_jax.core.types import Model, Queries
from ssd_jax.decoding import fan as fan_lib
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.fan import Fan
from ssd_jax.decoding.rows import (
  drafts as row_drafts,
  guesses,
  queries as row_queries,
  state as rows_lib,
)
from ssd_jax.decoding.rows.drafts import Fed
from ssd_jax.decoding.rows.state import Rows, Verdict

DRAFTS = ("auto", "heads", "above", "around", "copy", "both", "preview")
_NEED_HEADS = ("heads", "both")
_ROW_0, _ROW_BELOW = range(2)  # purposes of the drafts' random keys
# Default limit. With two guidance streams, a matmul over about as many rows
# takes accelerators as long as reading the weights.
_MOST_QUERIES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Staircase(DecoderBase, abc.ABC):
  """Base class of both staircases.

  Attributes:
    entry: Number of final tokens of a row at which the row below is drafted; 0
      drafts the row below as soon as the row itself is drafted.
    rows: Number of active rows.
    queries: Slots fed per pass, the first of those that need to be fed; None
      is as many as five rows have (`Exact`: one row), but at most 256.
    drafts: Source of a row's first drafts: "heads" (horizontal in row 0,
      vertical below), "above" (the distribution of the token above; in row 0
      that of token 0), "around" (a blur of the distributions of the three
      tokens above), "copy" (the token above), "both" (the mean of heads and
      above), "preview" (the preview's token there; above while the preview
      itself is generated) or "auto" (heads if the model has any, else above).
    coupled: Whether to sample each slot with its own noise in every pass, as AR
      does, instead of testing with min(1, p / q) and the noise of the pass.
    fan: Tokens fed for a row's first open slot, its draft included (`Exact`:
      of the first row alone). If the draft is rejected and its successor is
      among the others, two tokens become final; see `decoding.fan`. Costs
      fan - 1 queries for each row.
  """

  entry: int = 1
  rows: int = 4
  queries: int | None = None
  drafts: str = "auto"
  coupled: bool = False
  fan: int = 1

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
    check(self.fan >= 1, "fan", self.fan, ">= 1")

  def needs(self, model: Model) -> Needs:
    """Returns spatial heads if `drafts` requires them."""
    reads = self.drafts in _NEED_HEADS or self._uses_heads(model)
    return Needs(horizontal=reads, vertical=reads,
                 preview=self.drafts == "preview")

  def scratch(self, model: Model) -> int:
    """Returns one slot for each guess."""
    return self._fan_rows(model.grid) * fan_lib.num_guesses(
        self.fan, model.vocab)

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """Returns the state with row 0 drafted."""
    grid = ctx.model.grid
    if self.drafts in _NEED_HEADS and min(ctx.model.heads) < 1:
      raise UserError(
          f"Expected a model with spatial heads for drafts={self.drafts}, got "
          "a model without spatial heads. Train them, or use drafts=above."
      )
    rows = min(self.rows, grid.rows)
    state = rows_lib.start(ctx, p_V, hidden_GD, rows, grid.cols)
    state = self._draft_row_0(ctx, state, p_V)
    if grid.cols > 1:
      return state
    return self._advance(ctx, state, row_drafts.nothing_fed(grid, hidden_GD))

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """Returns the slots that the active rows need to feed."""
    grid = ctx.model.grid
    needed_N = self._needed(ctx.model, state)
    queries = row_queries.propose(
        ctx, state, needed_N, self._size(grid), self.row_causal
    )
    if self.fan == 1:
      return queries
    return fan_lib.append(queries, self._guesses(ctx, state))

  def resolve(
      self, ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Rows:
    """Verifies all drafts and commits each row's next tokens."""
    grid = ctx.model.grid
    # Drafts of heads follow nearly the model's distribution. Copies of the row
    # above do not: accepting them leniently would make images flat.
    judge = functools.partial(
        rows_lib.verify, ctx, state, coupled=self.coupled,
        lenience=self._lenience(grid), eager=self._uses_heads(ctx.model))
    size = self._size(grid)
    verdict = judge(queries.slots[:size], p_QV[:size])
    guessed_R = jnp.zeros(state.first.shape[0], bool)
    if self.fan > 1:
      fan = self._guesses(ctx, state)
      verdict, is_right_F = guesses.apply(
          ctx, state, fan, verdict, p_QV[size:],
          functools.partial(judge, purposes=rows_lib.SECOND), self.coupled)
      guessed_R = guessed_R.at[:is_right_F.shape[0]].set(is_right_F)
    queries = jax.tree.map(lambda x_Q: x_Q[:size], queries)
    final_Q = self._accepted_prefix(grid, state, verdict, guessed_R)
    state = rows_lib.commit(
        state, queries, verdict, verdict.had_draft, final_Q
    )
    return self._advance(ctx, state, (queries.slots, hidden_GQD[:, :size]))

  def _guesses(self, ctx: Context, state: Rows) -> Fan:
    return guesses.guess(
        ctx, state, self._fan_rows(ctx.model.grid), self.fan - 1, self.coupled)

  def _fan_rows(self, grid: Grid) -> int:
    """Returns the number of rows whose first open slot is guessed."""
    return min(self.rows, grid.rows)

  @abc.abstractmethod
  def _lookahead(self, cols: int) -> int:
    """Returns how many final tokens of the row above a token needs."""

  def _lenience(self, grid: Grid) -> float:
    """Returns the factor that a draft's q is multiplied by in its test."""
    return 1.0

  def _size(self, grid: Grid) -> int:
    most = min(self.rows, grid.rows) * grid.row_slots
    wanted = self.queries or min(
        self.default_rows * grid.row_slots, _MOST_QUERIES)
    return min(max(wanted, 1 + int(grid.end_of_row)), most)

  def _needed(self, model: Model, state: Rows) -> jax.Array:
    """Returns the slots to feed, bool [N].

    Heads need the whole row that they draft from. It is fed only if the queries
    suffice: open slots have priority, otherwise rows would make no progress.
    """
    grid = model.grid
    open_N = row_queries.open_rows(grid, state)
    if not self._uses_heads(model):
      return open_N
    row_N, _ = rows_lib.row_and_column(grid, jnp.arange(grid.length) + 1)
    is_source_N = (row_N == state.entered - 1) & (state.entered < grid.rows)
    wanted_N = open_N | (is_source_N & row_queries.whole_rows(grid, state))
    has_room = jnp.sum(wanted_N) <= self._size(grid)
    return jnp.where(has_room, wanted_N, open_N)

  def _accepted_prefix(
    self, grid: Grid, state: Rows, verdict: Verdict, guessed_R: jax.Array
  ) -> jax.Array:
    """Returns the slots that become final, bool [Q].

    If the first n tokens of a row are final or accepted, token n was resampled
    given these, so n + 1 tokens may become final, and n + 2 if token n had been
    guessed. The pass fed only the first n of them unchanged, so only these
    count for the row below.
    """
    row_Q, col_Q = rows_lib.row_and_column(grid, verdict.slots)
    rows = state.first.shape[0]
    row_R = jnp.minimum(state.lead + jnp.arange(rows), grid.rows - 1)
    fill_R = rows_lib.prefix(grid, state.final)[row_R]
    prefix_R = rows_lib.accepted_prefix(grid, state, verdict)[row_R]
    ahead_RC = jnp.full((rows, grid.cols), self._lookahead(grid.cols))
    if self.sure:
      entropy_Q = jnp.sum(jax.scipy.special.entr(verdict.p), axis=-1)
      is_sure_Q = verdict.is_open & (entropy_Q <= self.sure)
      at_Q = jnp.where(is_sure_Q, row_Q - state.lead, rows)
      ahead_RC = ahead_RC.at[at_Q, col_Q].set(0, mode="drop")
    # With row_causal, other rows did not see the drafts of this pass.
    fed_R = fill_R if self.row_causal else prefix_R
    count_R = rows_lib.count_committed(
        fill_R, prefix_R + 1 + guessed_R, fed_R, ahead_RC)
    at_Q = jnp.clip(row_Q - state.lead, 0, rows - 1)
    return verdict.is_open & (col_Q < count_R[at_Q])

  def _uses_heads(self, model: Model) -> bool:
    return self.drafts in ("auto", *_NEED_HEADS) and min(model.heads) >= 1

  def _draft_row_0(self, ctx: Context, state: Rows, p_V: jax.Array) -> Rows:
    """Drafts the rest of row 0 from the distribution of token 0, or heads."""
    cols_K = jnp.arange(1, ctx.model.grid.cols)
    q_KV = jnp.broadcast_to(p_V, (cols_K.shape[0], p_V.shape[0]))
    if self._uses_heads(ctx.model) and cols_K.shape[0]:
      source = jnp.zeros(1, jnp.int32), state.hidden[:, None]
      reach = min(ctx.model.heads[0], cols_K.shape[0])
      heads = [
          row_drafts.head_distributions(
              ctx, state, "horizontal", offset, source, jnp.bool_(True))
          for offset in range(1, reach + 1)
      ]
      # Positions beyond the last head reuse its distribution.
      q_KV = jnp.concatenate(heads)[jnp.minimum(cols_K, reach) - 1]
    drafts = row_drafts.sample_drafts(
        ctx, q_KV, cols_K, self._draft_method(), _ROW_0)
    drafts = row_drafts.prefer_given(
        ctx, drafts, cols_K, self.drafts == "preview")
    index_K = rows_lib.window_index(state, jnp.int32(0), cols_K)
    return row_drafts.put_drafts(
        state, cols_K, index_K, drafts, jnp.bool_(True)
    )

  def _advance(self, ctx: Context, state: Rows, fed: Fed) -> Rows:
    """Shifts the window and drafts the next row if it is due."""
    grid = ctx.model.grid
    entry = rows_lib.at_most(
        self.entry, 0, grid.cols, "entry", "the columns")
    row, cols_C = state.entered, jnp.arange(grid.cols)
    above_C = jnp.asarray(grid.slot_of)[row - 1]
    lead = rows_lib.first_open_row(grid, state.final)
    moved = rows_lib.shift_window(state, lead, state.first)
    needed = jnp.sum(row_queries.open_rows(grid, moved))
    is_due = (
        (row < grid.rows) & (row < lead + state.first.shape[0])
        & (jnp.sum(state.final[above_C]) >= entry)
        & (needed < self._size(grid))
    )
    q_CV = self._next_row_distributions(ctx, state, fed, above_C, is_due)
    slots_C = above_C + grid.row_slots
    drafts = row_drafts.sample_drafts(
      ctx, q_CV, slots_C, self._draft_method(), _ROW_BELOW
    )
    drafts = row_drafts.prefer_given(
        ctx, drafts, slots_C, self.drafts == "preview")
    index_C = rows_lib.window_index(moved, row, cols_C)
    moved = row_drafts.put_drafts(moved, slots_C, index_C, drafts, is_due)
    return moved.replace(entered=row + is_due)

  def _next_row_distributions(
      self, ctx: Context, state: Rows, fed: Fed, above_C: jax.Array,
      is_due: jax.Array,
  ) -> jax.Array:
    """Returns the distributions to draft the next row from, float32 [C, V]."""
    row_col = rows_lib.row_and_column(ctx.model.grid, above_C)
    q_CV = state.q[rows_lib.window_index(state, *row_col)]
    if self.drafts == "copy":
      return jax.nn.one_hot(state.tokens[above_C], ctx.model.vocab)
    if self.drafts == "around":
      padded = jnp.concatenate([q_CV[:1], q_CV, q_CV[-1:]])
      return (padded[:-2] + 2 * q_CV + padded[2:]) / 4
    if not self._uses_heads(ctx.model):
      return q_CV
    hidden_GCD, is_fed_C = row_drafts.predicting_states(state, fed, above_C)
    heads_CV = row_drafts.head_distributions(
        ctx, state, "vertical", 1, (above_C, hidden_GCD), is_due
    )
    if self.drafts == "both":
      heads_CV = (heads_CV + q_CV) / 2
    return jnp.where(is_fed_C[:, None], heads_CV, q_CV)

  def _draft_method(self) -> str:
    return "coupled" if self.coupled else "sample"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stair(_Staircase):
  """Commits rows token by token, each `lookahead` tokens behind the row above.

  The default settings are the best trade-off measured (docs/results.md).

  Attributes:
    lookahead: Number of final tokens of the row above that a token needs,
      counted from the token directly above to the right; from the number of
      columns on, the output follows AR's distribution. None is 4, or one less
      than the columns of a narrow grid.
    sure: Entropy in nats up to which a token needs none of these, but only the
      tokens to the left of the one above.
    lenience: Factor that a draft's q is multiplied by in its test; below 1 more
      drafts are accepted than the exact test accepts (Leviathan et al. 2023,
      arXiv:2211.17192, appendix A.5). A token's first test is exact unless
      heads drafted it. None is 0.6, or 1 if the decoder is otherwise lossless.
    row_causal: Whether to hide the drafts of other rows (PJD's mask).
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

  def is_lossless(self, grid: Grid) -> bool:
    """Returns whether rows wait for the whole row above and tests are exact."""
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
  """Commits the accepted raster prefix and the first resampled token; lossless.

  A pass feeds as many slots as a row has. Three times as many would save one
  pass in ten, but a pass of the embedded model on a CPU would take 1.7 times as
  long.

  Attributes:
    lookahead: Number of final tokens of the row above; None is all of them.
      Fewer would not be exact.
  """

  rows: int = 3
  lookahead: int | None = None
  default_rows = 1
  name = "exact"
  lossless = True

  def _fan_rows(self, grid: Grid) -> int:
    return 1

  def _lookahead(self, cols: int) -> int:
    if self.lookahead is not None and self.lookahead < cols:
      raise UserError(
          f"Expected lookahead to be at least {cols} (the columns) for exact, "
          f"got lookahead={self.lookahead}. Omit it, or use stair."
      )
    return cols
