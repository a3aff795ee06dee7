"""SSD: spatial heads draft whole rows, which are corrected and committed.

Horizontal heads draft row 0 in groups; vertical heads draft every block of rows
below it from the last committed row. A round tests every draft of a block
independently and resamples the rejected ones (auto-correction). After its
rounds a row is fed once more, unchanged: this makes it final and yields the
hidden states that the next rows are drafted from. So the number of passes does
not depend on the image, and the joint distribution is not the model's.

Source: SSD, arXiv:2606.20543, section 3.3.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError, check
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import DecoderBase, Needs
from ssd_jax.core.types import Model, Queries
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import (
  drafts as row_drafts,
  queries as row_queries,
  state as rows_lib,
)
from ssd_jax.decoding.rows.drafts import Fed
from ssd_jax.decoding.rows.state import Rows, Verdict

SCHEDULES = ("joint", "staged", "pipelined")
DRAFTS = ("sample", "argmax", "preview")
_HORIZONTAL, _VERTICAL = 5, 1  # default numbers of heads, as in the paper


@flax.struct.dataclass
class ScheduleState:
  """State of the schedule.

  Attributes:
    rounds: int32 [H], remaining correction rounds of each grid row.
    waited: int32 [], passes since a row last entered.
  """

  rounds: jax.Array
  waited: jax.Array


@dataclasses.dataclass(frozen=True)
class SSD(DecoderBase):
  """Spatially speculative decoding.

  Attributes:
    horizontal: Heads used in row 0, i.e. tokens per group; None is 5, or as
      many as the model has. Without heads, as many as the grid allows.
    vertical: Heads used below row 0, i.e. rows per block; None is 1.
    rounds: Correction rounds of a block.
    horizontal_rounds: Correction rounds of a group.
    schedule: "joint" corrects a block's rows together and commits them one
      after the other; "staged" gives each row but the first `staged_rounds`
      more rounds once the row above is committed; "pipelined" lets a row enter
      every `lag` passes, while the rows above are still being corrected.
    staged_rounds: Additional rounds of "staged"; None for 4.
    lag: Passes between entering rows of "pipelined"; None for 2, or rounds + 1
      if that is less, which equals "joint".
    adaptive: Whether a row is done with its rounds once a round changes none
      of its tokens: it has then been fed unchanged.
    drafts: "sample" from the heads' distributions, their "argmax", or
      "preview", which needs no heads: the preview's token there; while the
      preview itself is generated, samples of the distribution of the token
      that heads would draft from.
    lenience: Factor that a draft's q is multiplied by in its test; 1 is the
      paper's test. A round resamples all rejected drafts of a row, each given
      the old neighbours, so fewer rejections cause fewer conflicts (ours).
  """

  horizontal: int | None = None
  vertical: int | None = None
  rounds: int = 2
  horizontal_rounds: int = 1
  schedule: str = "joint"
  staged_rounds: int | None = None
  lag: int | None = None
  adaptive: bool = False
  drafts: str = "sample"
  lenience: float = 1.0

  name = "ssd"
  lossless = False

  def __post_init__(self):
    for field, least in (("horizontal", 1), ("vertical", 1), ("rounds", 0),
                         ("horizontal_rounds", 0), ("staged_rounds", 0),
                         ("lag", 1)):
      value = getattr(self, field)
      check(value is None or value >= least, field, value, f">= {least}")
    check(self.schedule in SCHEDULES, "schedule", self.schedule,
          f"one of {', '.join(SCHEDULES)}")
    check(self.drafts in DRAFTS, "drafts", self.drafts,
          f"one of {', '.join(DRAFTS)}")
    check(0 < self.lenience <= 1, "lenience", self.lenience, "in (0, 1]")
    if self.schedule == "pipelined":
      check(self.vertical in (None, 1), "vertical", self.vertical,
            "1 where rows enter one by one")
      check((self.lag or 1) <= self.rounds + 1, "lag", self.lag,
            f"at most {self.rounds + 1} (rounds + 1)")
    for field, schedule in (("lag", "pipelined"), ("staged_rounds", "staged")):
      value = getattr(self, field)
      check(value is None or self.schedule == schedule, field, value,
            f"none, or schedule={schedule}")

  @property
  def has_fixed_passes(self) -> bool:
    """Whether all images of a grid take the same number of passes."""
    return not self.adaptive

  def needs(self, model: Model) -> Needs:
    """Returns the spatial heads, or the preview, that drafts are made with."""
    if self._is_headless:
      return Needs(preview=True)
    return Needs(horizontal=model.grid.cols > 1, vertical=model.grid.rows > 1)

  @property
  def _is_headless(self) -> bool:
    return self.drafts == "preview"

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """Returns the state with the first group of row 0 drafted."""
    grid = ctx.model.grid
    rows = self._rows_in_flight(ctx.model)
    state = rows_lib.start(ctx, p_V, hidden_GD, rows, grid.cols)
    rounds_H = jnp.zeros(grid.rows, jnp.int32)
    state = state.replace(plan=ScheduleState(rounds_H, jnp.int32(0)))
    return self._advance(ctx, state, row_drafts.nothing_fed(grid, hidden_GD))

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """Returns all slots of the active rows."""
    grid = ctx.model.grid
    size = self._rows_in_flight(ctx.model) * grid.row_slots
    needed_N = row_queries.whole_rows(grid, state)
    return row_queries.propose(ctx, state, needed_N, size)

  def resolve(
      self, ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Rows:
    """Corrects or commits the active rows, and drafts the next ones."""
    grid = ctx.model.grid
    verdict = rows_lib.verify(
        ctx, state, queries.slots, p_QV, lenience=self.lenience, eager=True)
    row_Q, _ = rows_lib.row_and_column(grid, verdict.slots)
    is_round_H = (state.plan.rounds > 0) & _in_flight(grid, state)
    is_done_H = self._done(state, verdict, row_Q, is_round_H)
    state = rows_lib.commit(
        state, queries, verdict, verdict.had_draft & is_round_H[row_Q],
        verdict.had_draft & is_done_H[row_Q],
    )
    plan = ScheduleState(state.plan.rounds - is_round_H, state.plan.waited + 1)
    fed = queries.slots, hidden_GQD
    return self._advance(ctx, state.replace(plan=plan), fed)

  def _done(
      self, state: Rows, verdict: Verdict, row_Q: jax.Array,
      is_round_H: jax.Array,
  ) -> jax.Array:
    """Returns which rows are final after the pass, bool [H].

    These are the first row after the pass that commits it and, if adaptive,
    rows that a round left unchanged while all rows above are final.
    """
    rejected_Q = verdict.had_draft & ~verdict.accepted
    changed_Q = jnp.where(rejected_Q, row_Q, is_round_H.shape[0])
    is_changed_H = jnp.zeros_like(is_round_H).at[changed_Q].set(
        True, mode="drop"
    )
    is_clean_H = is_round_H & self.adaptive & ~is_changed_H
    row_H = jnp.arange(is_round_H.shape[0])
    is_first_H = (row_H == state.lead) & ~is_round_H
    is_done_H = (row_H < state.lead) | is_first_H | is_clean_H
    return jnp.cumprod(is_done_H).astype(bool)

  def _advance(self, ctx: Context, state: Rows, fed: Fed) -> Rows:
    """Shifts the window and drafts the next group or rows if they are due."""
    grid, entered = ctx.model.grid, state.entered
    lead = rows_lib.first_open_row(grid, state.final)
    moved = rows_lib.shift_window(state, lead, state.first)
    plan = state.plan
    if self.schedule != "pipelined":
      # The next row of a block starts its additional rounds.
      more = self._more_rounds()
      is_next = (lead > state.lead) & (lead < entered)
      plan = plan.replace(
          rounds=plan.rounds.at[lead].max(jnp.where(is_next, more, 0))
      )
    moved = moved.replace(plan=plan)
    if grid.cols > 1:
      moved = self._draft_group(ctx, state, moved, fed)
    if grid.rows > 1:
      moved = self._draft_block(ctx, state, moved, fed)
    return moved

  def _draft_group(
      self, ctx: Context, state: Rows, moved: Rows, fed: Fed
  ) -> Rows:
    """Drafts the next group of row 0 if the last group is final."""
    cols = ctx.model.grid.cols
    count = jnp.sum(state.final[:cols])
    is_due = (count < cols) & (jnp.sum(state.known[:cols]) == count)
    last = jnp.reshape(count - 1, 1)
    hidden_G1D, _ = row_drafts.predicting_states(state, fed, last)
    reach = min(self._heads(ctx.model)[0], cols - 1)
    q_KV = jnp.concatenate([
        self._distributions(
            ctx, state, "horizontal", offset, (last, hidden_G1D), is_due)
        for offset in range(1, reach + 1)
    ])
    slots_K = count + jnp.arange(reach)
    drafts = self._sample_drafts(ctx, q_KV, slots_K)
    index_K = rows_lib.window_index(moved, jnp.int32(0), slots_K)
    moved = row_drafts.put_drafts(
        moved, slots_K, index_K, drafts, is_due & (slots_K < cols)
    )
    rounds = jnp.where(is_due, self.horizontal_rounds, 0)
    return moved.replace(plan=moved.plan.replace(
        rounds=moved.plan.rounds.at[0].max(rounds)
    ))

  def _draft_block(
      self, ctx: Context, state: Rows, moved: Rows, fed: Fed
  ) -> Rows:
    """Drafts the next rows from the last entered row if they are due."""
    grid, entered = ctx.model.grid, state.entered
    is_due = moved.lead >= entered
    if self.schedule == "pipelined":
      is_due |= (moved.lead > 0) & (state.plan.waited >= self._lag())
    source_C = jnp.asarray(grid.slot_of)[entered - 1]
    cols_C = jnp.arange(grid.cols)
    hidden_GCD, _ = row_drafts.predicting_states(state, fed, source_C)
    plan = moved.plan
    for offset in range(1, self._heads(ctx.model)[1] + 1):
      row = entered + offset - 1
      is_new = is_due & (row < grid.rows)
      q_CV = self._distributions(
          ctx, state, "vertical", offset, (source_C, hidden_GCD), is_new
      )
      slots_C = source_C + offset * grid.row_slots
      drafts = self._sample_drafts(ctx, q_CV, slots_C, offset)
      index_C = rows_lib.window_index(moved, row, cols_C)
      moved = row_drafts.put_drafts(moved, slots_C, index_C, drafts, is_new)
      moved = moved.replace(entered=moved.entered + is_new)
      plan = ScheduleState(
          plan.rounds.at[row].max(jnp.where(is_new, self.rounds, 0)),
          jnp.where(is_new, 0, plan.waited),
      )
    return moved.replace(plan=plan)

  def _distributions(
      self, ctx: Context, state: Rows, direction: str, offset: int,
      source: tuple[jax.Array, jax.Array], is_due: jax.Array,
  ) -> jax.Array:
    """Returns what to draft from, [K, V]; see `drafts.head_distributions`."""
    if not self._is_headless:
      return row_drafts.head_distributions(
          ctx, state, direction, offset, source, is_due)
    at_K = rows_lib.window_index(
        state, *rows_lib.row_and_column(ctx.model.grid, source[0]))
    return state.q[at_K]

  def _sample_drafts(
      self, ctx: Context, q_KV: jax.Array, slots_K: jax.Array, purpose: int = 0
  ) -> Drafts:
    method = "sample" if self._is_headless else self.drafts
    drafts = row_drafts.sample_drafts(ctx, q_KV, slots_K, method, purpose)
    return row_drafts.prefer_given(ctx, drafts, slots_K, self._is_headless)

  def _rows_in_flight(self, model: Model) -> int:
    rows = max(self._heads(model)[1], 1)
    if self.schedule == "pipelined":
      rows = -(-(self.rounds + 1) // self._lag())
    return min(rows, model.grid.rows)

  def _lag(self) -> int:
    return min(2, self.rounds + 1) if self.lag is None else self.lag

  def _more_rounds(self) -> int:
    """Returns the additional rounds of all but the first row of a block."""
    if self.schedule != "staged":
      return 0
    return 4 if self.staged_rounds is None else self.staged_rounds

  def _heads(self, model: Model) -> tuple[int, int]:
    """Returns the numbers of horizontal and vertical heads in use."""
    grid, limits, what = model.grid, model.heads, "the model's heads"
    if self._is_headless:
      limits = max(grid.cols - 1, 1), max(grid.rows - 1, 1)
      what = f"below the sides of a grid of {grid.rows}x{grid.cols}"
    across, down = (
        rows_lib.at_most(value, default, most, field, what)
        for value, default, most, field in (
            (self.horizontal, _HORIZONTAL, limits[0], "horizontal"),
            (self.vertical, _VERTICAL, limits[1], "vertical")))
    if (grid.cols > 1 and not across) or (grid.rows > 1 and not down):
      raise UserError(
          "Expected at least one spatial head of each direction for ssd, got "
          f"{model.heads} (horizontal, vertical). Train them with train.mtp, "
          "or use stair."
      )
    return across, down


def _in_flight(grid: Grid, state: Rows) -> jax.Array:
  """Returns which rows have entered and are not final, bool [H]."""
  row_H = jnp.arange(grid.rows)
  return (row_H >= state.lead) & (row_H < state.entered)
