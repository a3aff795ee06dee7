"""SSD: whole rows drafted by spatial heads, corrected in rounds, committed.

Row 0 is drafted in groups by horizontal heads, every block of rows below it
from the last committed row by vertical heads. A round tests every draft of a
block on its own and redraws those that fail (auto-correction). After its rounds
a row is fed once more, unchanged, which makes it final and yields the states
that the next rows are drafted from. So the number of passes does not depend on
the picture, and the joint law is not the model's.

Source: SSD, arXiv:2606.20543, section 3.3.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.config import UserError, check
from ssd_jax.decoding import row_drafts, rows as rows_lib
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import Rows, Verdict
from ssd_jax.types import Model, Queries

SCHEDULES = ("joint", "staged", "pipelined")
DRAFTS = ("sample", "argmax")


@flax.struct.dataclass
class Plan:
  """Where the schedule stands.

  Attributes:
    rounds: int32 [grid rows], rounds that each row has ahead of it.
    waited: int32 [], passes since a row entered.
  """

  rounds: jax.Array
  waited: jax.Array


@dataclasses.dataclass(frozen=True)
class SSD:
  """Spatially speculative decoding.

  Attributes:
    horizontal: Heads, and so cells per group, in row 0.
    vertical: Heads, and so rows per block, below.
    rounds: Of a block.
    horizontal_rounds: Of a group.
    schedule: "joint" corrects a block's rows together and commits them one
      after the other; "staged" gives each but the first `staged_rounds` more,
      once the one above is committed; "pipelined" lets a row enter every `lag`
      passes, while those above are still being corrected.
    staged_rounds: Of "staged".
    lag: Of "pipelined"; rounds + 1 is "joint".
    adaptive: A row whose round changed nothing needs no further one: it has
      been fed as it stands.
    drafts: "sample" from the heads' distributions, or their "argmax".
  """

  horizontal: int = 5
  vertical: int = 1
  rounds: int = 2
  horizontal_rounds: int = 1
  schedule: str = "joint"
  staged_rounds: int = 4
  lag: int = 2
  adaptive: bool = False
  drafts: str = "sample"

  name = "ssd"
  lossless = False

  def __post_init__(self):
    for field, least in (("horizontal", 1), ("vertical", 1), ("rounds", 0),
                         ("horizontal_rounds", 0), ("staged_rounds", 0),
                         ("lag", 1)):
      value = getattr(self, field)
      check(value >= least, field, value, f">= {least}")
    check(self.schedule in SCHEDULES, "schedule", self.schedule,
          f"one of {', '.join(SCHEDULES)}")
    check(self.drafts in DRAFTS, "drafts", self.drafts,
          f"one of {', '.join(DRAFTS)}")
    if self.schedule == "pipelined":
      check(self.vertical == 1, "vertical", self.vertical,
            "1 where rows enter one by one")
      rows_lib.clamp(self, "lag", self.rounds + 1, "rounds + 1")

  def scratch(self, model: Model) -> int:
    """None."""
    return 0

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Rows:
    """State with the first group of row 0 drafted."""
    grid = ctx.model.grid
    rows = min(self._rows_in_flight(ctx.model), grid.rows)
    first_R, width = rows_lib.full_window(grid, rows)
    state = rows_lib.start(ctx, p_V, hidden_GD, first_R, width)
    rounds_N = jnp.zeros(grid.rows, jnp.int32)
    state = state.replace(plan=Plan(rounds_N, jnp.int32(0)))
    shape = (hidden_GD.shape[0], len(state.q), hidden_GD.shape[1])
    return self._advance(ctx, state, jnp.zeros(shape, hidden_GD.dtype))

  def propose(self, ctx: Context, state: Rows) -> Queries:
    """The rows in flight."""
    return rows_lib.propose(ctx, state)

  def resolve(
      self, ctx: Context, state: Rows, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Rows:
    """State with rows corrected or committed, and the next ones drafted."""
    verdict = rows_lib.judge(ctx, state, queries, p_QV)
    row_R = state.lead + jnp.arange(state.first.shape[0])
    rounds_R = state.plan.rounds.at[row_R].get(mode="fill", fill_value=0)
    is_round_R = (rounds_R > 0) & (row_R < state.entered)
    is_done_R = self._done(verdict, is_round_R)
    over = lambda x_R: jnp.repeat(x_R, state.q.shape[0] // len(x_R))
    state = rows_lib.commit(
        state, queries, verdict, verdict.had_draft & over(is_round_R),
        verdict.had_draft & over(is_done_R),
    )
    plan = Plan(
        state.plan.rounds.at[row_R].add(-1 * is_round_R, mode="drop"),
        state.plan.waited + 1,
    )
    return self._advance(ctx, state.replace(plan=plan), hidden_GQD)

  def _done(self, verdict: Verdict, is_round_R: jax.Array) -> jax.Array:
    """bool [R]: rows that are final after the pass.

    The first row after the pass that commits it; and, if adaptive, rows that a
    round left as they are, where those above are final.
    """
    rejected_W = verdict.had_draft & ~verdict.passed
    is_clean_R = is_round_R & self.adaptive & ~jnp.any(
        rejected_W.reshape(len(is_round_R), -1), axis=1
    )
    is_done_R = is_clean_R.at[0].set(is_clean_R[0] | ~is_round_R[0])
    return jnp.cumprod(is_done_R).astype(bool)

  def _advance(
      self, ctx: Context, state: Rows, hidden_GWD: jax.Array
  ) -> Rows:
    """State with the window moved on and what is due drafted."""
    grid, entered = ctx.model.grid, state.entered
    moved = rows_lib.move(state, rows_lib.full_lead(grid, state), state.first)
    plan = state.plan
    if self.schedule != "pipelined":
      # A block's next row begins its own rounds.
      more = self.staged_rounds if self.schedule == "staged" else 0
      is_next = (moved.lead > state.lead) & (moved.lead < entered)
      plan = plan.replace(
          rounds=plan.rounds.at[moved.lead].max(jnp.where(is_next, more, 0))
      )
    moved = moved.replace(plan=plan)
    if grid.cols > 1:
      moved = self._draft_group(ctx, state, moved, hidden_GWD)
    if grid.rows > 1:
      moved = self._draft_block(ctx, state, moved, hidden_GWD)
    return moved

  def _draft_group(
      self, ctx: Context, state: Rows, moved: Rows, hidden_GWD: jax.Array
  ) -> Rows:
    """State with the next group of row 0 drafted, if the last is final."""
    cols = ctx.model.grid.cols
    count = jnp.sum(state.final[:cols])
    is_due = (count < cols) & (jnp.sum(state.known[:cols]) == count)
    last = jnp.reshape(count - 1, 1)
    hidden_G1D = row_drafts.predictors(state, hidden_GWD, jnp.int32(0), last)
    reach = min(self._heads(ctx.model)[0], cols - 1)
    q_KV = jnp.concatenate([
        row_drafts.spread(ctx, state, "horizontal", offset, (last, hidden_G1D))
        for offset in range(1, reach + 1)
    ])
    slots_K = count + jnp.arange(reach)
    drafts = row_drafts.draw(ctx, q_KV, slots_K, self.drafts)
    index_K = rows_lib.window_index(moved, jnp.int32(0), slots_K)
    moved = row_drafts.put_drafts(
        moved, slots_K, index_K, drafts, is_due & (slots_K < cols)
    )
    rounds = jnp.where(is_due, self.horizontal_rounds, 0)
    return moved.replace(plan=moved.plan.replace(
        rounds=moved.plan.rounds.at[0].max(rounds)
    ))

  def _draft_block(
      self, ctx: Context, state: Rows, moved: Rows, hidden_GWD: jax.Array
  ) -> Rows:
    """State with the next rows drafted from the last one, if they are due."""
    grid, entered = ctx.model.grid, state.entered
    is_due = moved.lead >= entered
    if self.schedule == "pipelined":
      is_due |= (moved.lead > 0) & (state.plan.waited >= self._lag())
    source_C = jnp.asarray(grid.slot_of)[entered - 1]
    cols_C = jnp.arange(grid.cols)
    hidden_GCD = row_drafts.predictors(state, hidden_GWD, entered - 1, cols_C)
    plan = moved.plan
    for offset in range(1, self._heads(ctx.model)[1] + 1):
      row = entered + offset - 1
      is_new = is_due & (row < grid.rows)
      q_CV = row_drafts.spread(
          ctx, state, "vertical", offset, (source_C, hidden_GCD)
      )
      slots_C = source_C + offset * grid.row_slots
      drafts = row_drafts.draw(ctx, q_CV, slots_C, self.drafts, offset)
      index_C = rows_lib.window_index(moved, row, cols_C)
      moved = row_drafts.put_drafts(moved, slots_C, index_C, drafts, is_new)
      moved = moved.replace(entered=moved.entered + is_new)
      plan = Plan(
          plan.rounds.at[row].max(jnp.where(is_new, self.rounds, 0)),
          jnp.where(is_new, 0, plan.waited),
      )
    return moved.replace(plan=plan)

  def _rows_in_flight(self, model: Model) -> int:
    if self.schedule == "pipelined":
      return -(-(self.rounds + 1) // self._lag())
    return max(self._heads(model)[1], 1)

  def _lag(self) -> int:
    return min(self.lag, self.rounds + 1)

  def _heads(self, model: Model) -> tuple[int, int]:
    """Horizontal and vertical heads in use."""
    grid = model.grid
    used = tuple(
        rows_lib.clamp(self, field, most, "the heads at hand")
        for field, most in zip(("horizontal", "vertical"), model.heads)
    )
    if (grid.cols > 1 and not used[0]) or (grid.rows > 1 and not used[1]):
      raise UserError(
          f"got spatial heads {model.heads} (horizontal, vertical), expected "
          "at least one of each for ssd; train them with train.mtp, or use "
          "stair"
      )
    return used
