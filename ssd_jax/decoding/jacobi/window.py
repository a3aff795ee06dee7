"""The window that slides along the raster, shared by the Jacobi decoders.

A window of W queries starts at the last final slot: it looks at that slot and
at W - 1 drafts, and yields the targets of W slots. The drafts that pass become
final up to the first that fails; that one is redrawn from the residual and
becomes final too; what follows stays a draft, redrawn from its new target.

Why it is lossless, whatever the drafts are: what a slot holds in a pass depends
on its own noise and on the slots before it, and given what those have held so
far it is a draw from its latest target. When it is looked at, and when it
becomes final, depends on the slots before it alone.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import check
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Model, Queries
from ssd_jax.decoding import acceptance, sampling
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.jacobi import initial_drafts

TAILS = ("full", "reference")
_TEST_PURPOSE, _DRAW_PURPOSE = 0, 1


@flax.struct.dataclass
class JacobiState:
  """One image's progress; its drafts are at `next` and the slots that follow.

  Attributes:
    tokens: int32 [N].
    final: bool [N].
    next: int32 [], the first slot that is undecided or forced.
    q: float32 [Q - 1, V], the distribution of each draft.
    is_point: bool [Q - 1], drafts that were given, not drawn.
    above: float32 [row slots, V], the last target seen in each column, or None
      where no draft is made from it.
  """

  tokens: jax.Array
  final: jax.Array
  next: jax.Array
  q: jax.Array
  is_point: jax.Array
  above: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Jacobi:
  """What the one-dimensional Jacobi decoders share.

  Attributes:
    window: Queries W of a pass, forced slots included; beyond the end of the
      image they idle. 1 is autoregressive decoding, token for token.
    init: How slots that enter the window are drafted, one of
      `first_drafts.INITS`.
    tail: "full" runs windows to the end; "reference" ends one by one, W + 2
      slots before the end, as the published code for LlamaGen does.
  """

  window: int = 16
  init: str = "random"
  tail: str = "full"

  acceptance = "exact"
  coupling = "none"

  def __post_init__(self):
    check(self.window >= 1, "window", self.window, ">= 1")
    check(self.init in initial_drafts.INITS, "init", self.init,
          f"one of {', '.join(initial_drafts.INITS)}")
    check(self.tail in TAILS, "tail", self.tail, f"one of {', '.join(TAILS)}")

  @property
  def lossless(self) -> bool:
    """Whatever the drafts are."""
    return True

  def num_queries(self, grid: Grid) -> int:
    """Queries of a pass; a forced slot needs one beside the sampled one's."""
    return min(max(self.window, 1 + int(grid.end_of_row)), grid.length)

  def scratch(self, model: Model) -> int:
    """None."""
    return 0

  def start(
      self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array
  ) -> JacobiState:
    """State with cell 0 sampled from the prefill and a window drafted."""
    del hidden_GD
    grid, vocab = ctx.model.grid, ctx.model.vocab
    forced_N = jnp.asarray(grid.forced_tokens(vocab))
    keeps_above = self.init == "sample_above"
    state = JacobiState(
        jnp.maximum(forced_N, 0), forced_N >= 0, jnp.int32(0),
        jnp.zeros((self.num_queries(grid) - 1, vocab)),
        jnp.zeros(self.num_queries(grid) - 1, bool),
        jnp.zeros((grid.row_slots, vocab)) if keeps_above else None,
    )
    slots_1 = state.next[None]
    token_1 = sampling.sample(p_V[None], ctx.token_noise(slots_1))
    return self._advance(ctx, state, token_1, p_V[None], jnp.int32(1))

  def propose(self, ctx: Context, state: JacobiState) -> Queries:
    """The last final slot and the drafts that follow it."""
    grid = ctx.model.grid
    slots_Q = state.next - 1 + jnp.arange(self.num_queries(grid))
    # Nothing is left to predict from the last slot on.
    is_active_Q = slots_Q < grid.length - 1
    positions_Q = jnp.minimum(slots_Q, grid.length - 1)
    return Queries(
        state.tokens[positions_Q], positions_Q,
        jnp.where(is_active_Q, slots_Q, grid.length),
        jnp.arange(grid.length) <= positions_Q[:, None],
    )

  def resolve(
      self, ctx: Context, state: JacobiState, queries: Queries,
      p_QV: jax.Array, hidden_GQD: jax.Array,
  ) -> JacobiState:
    """State with the drafts tested, the window moved and redrafted."""
    del queries, hidden_GQD
    grid, size = ctx.model.grid, p_QV.shape[0]
    slots_Q = state.next + jnp.arange(size)
    is_forced_Q = _is_forced(grid, slots_Q)
    is_tested_Q = ~is_forced_Q & (jnp.arange(size) < size - 1)
    is_tested_Q &= ~self._one_by_one(grid, state.next)
    drafts = Drafts(
        state.tokens[jnp.minimum(slots_Q[:-1], grid.length - 1)],
        state.q, state.is_point,
    )
    judge = self._equate if self.acceptance == "equality" else self._test
    accepted_Q, tokens_Q = judge(ctx, slots_Q, p_QV, drafts, is_tested_Q)
    count = acceptance.count_prefix(is_forced_Q | accepted_Q)
    following = state.next + jnp.minimum(count + 1, size)
    following = jnp.minimum(following, grid.length)
    return self._advance(ctx, state, tokens_Q, p_QV, following)

  def accept(
      self, ctx: Context, p_QV: jax.Array, drafts: Drafts, u_Q: jax.Array
  ) -> jax.Array:
    """bool [Q]: whether each draft passes."""
    del ctx
    return acceptance.accept_exact(p_QV, drafts, u_Q)

  def _one_by_one(self, grid: Grid, following: jax.Array) -> jax.Array:
    """bool []: whether drafts are ignored, and one free slot is drawn."""
    if self.window == 1:
      return jnp.bool_(True)
    if self.tail == "full":
      return jnp.bool_(False)
    return following >= grid.length - min(self.window, grid.length) - 2

  def _equate(
      self, ctx: Context, slots_Q: jax.Array, p_QV: jax.Array, drafts: Drafts,
      is_tested_Q: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """(passed, tokens): a draft passes if its slot's noise draws it again."""
    tokens_Q = sampling.sample(p_QV, ctx.token_noise(slots_Q))
    same_Q = _pad(drafts.tokens == tokens_Q[:-1])
    return is_tested_Q & same_Q, tokens_Q

  def _test(
      self, ctx: Context, slots_Q: jax.Array, p_QV: jax.Array, drafts: Drafts,
      is_tested_Q: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """(passed, tokens): what each slot of the window holds after the pass."""
    u_Q = jax.random.uniform(
        ctx.pass_key(_TEST_PURPOSE), drafts.tokens.shape
    )
    accepted_Q = _pad(self.accept(ctx, p_QV[:-1], drafts, u_Q)) & is_tested_Q
    rejected_Q = is_tested_Q & ~accepted_Q
    if self.coupling != "maximal":
      # Only the first rejection is corrected; later slots are drawn afresh.
      is_prefix_Q = jnp.cumsum(rejected_Q) == 0
      rejected_Q &= jnp.cumsum(rejected_Q) == 1
      accepted_Q &= is_prefix_Q
    dist_QV = jnp.concatenate(
        [acceptance.residual(p_QV[:-1], drafts), p_QV[-1:]]
    )
    dist_QV = jnp.where(rejected_Q[:, None], dist_QV, p_QV)
    # A correction must not reuse the noise its draft was drawn with. A slot
    # without a draft to test may take the noise AR takes.
    is_shared_Q = ~rejected_Q if self.coupling == "gumbel" else ~is_tested_Q
    drawn_Q = jnp.where(
        is_shared_Q,
        sampling.sample(dist_QV, ctx.token_noise(slots_Q)),
        sampling.sample_inverse(dist_QV, ctx.pass_key(_DRAW_PURPOSE)),
    )
    return accepted_Q, jnp.where(accepted_Q, _pad(drafts.tokens), drawn_Q)

  def _advance(
      self, ctx: Context, state: JacobiState, tokens_Q: jax.Array,
      p_QV: jax.Array, following: jax.Array,
  ) -> JacobiState:
    """State with the slots from `next` on drawn and `following` next."""
    grid = ctx.model.grid
    slots_Q = state.next + jnp.arange(tokens_Q.shape[0])
    tokens_N = _write(grid, state.tokens, slots_Q, tokens_Q)
    above = state.above
    if above is not None:
      above = _write_columns(grid, above, slots_Q, p_QV)
    # Slots drawn in this pass and not final are drafts, drawn from their p.
    slots_D = following + jnp.arange(state.q.shape[0])
    rows_D = slots_D - state.next
    is_fresh_D = rows_D >= p_QV.shape[0]
    q_DV = p_QV[jnp.minimum(rows_D, p_QV.shape[0] - 1)]
    near_DV = q_DV if above is None else above[slots_D % grid.row_slots]
    first = initial_drafts.draft_first(
        ctx, self.init, slots_D, slots_Q[-1], tokens_N, near_DV
    )
    fresh_slots_D = jnp.where(is_fresh_D, slots_D, grid.length)
    return JacobiState(
        _write(grid, tokens_N, fresh_slots_D, first.tokens),
        jnp.asarray(grid.is_forced) | (jnp.arange(grid.length) < following),
        following, jnp.where(is_fresh_D[:, None], first.q, q_DV),
        is_fresh_D & first.is_point, above,
    )


def _is_forced(grid: Grid, slots_Q: jax.Array) -> jax.Array:
  """bool [Q]: forced slots of the image."""
  forced_N = jnp.asarray(grid.is_forced)
  return forced_N.at[slots_Q].get(mode="fill", fill_value=False)


def _pad(x_D: jax.Array) -> jax.Array:
  """[D + 1]: with a zero for the last target, which has no draft."""
  return jnp.pad(x_D, (0, 1))


def _write(
    grid: Grid, tokens_N: jax.Array, slots_Q: jax.Array, tokens_Q: jax.Array
) -> jax.Array:
  """int32 [N]: tokens with free slots of the image written."""
  nowhere = grid.length
  slots_Q = jnp.where(_is_forced(grid, slots_Q), nowhere, slots_Q)
  return tokens_N.at[slots_Q].set(tokens_Q, mode="drop")


def _write_columns(
    grid: Grid, above_CV: jax.Array, slots_Q: jax.Array, p_QV: jax.Array
) -> jax.Array:
  """float32 [row slots, V]: with the lowest new target of each column."""
  is_kept_Q = (slots_Q < grid.length) & (slots_Q > slots_Q[-1] - grid.row_slots)
  columns_Q = jnp.where(is_kept_Q, slots_Q % grid.row_slots, grid.row_slots)
  return above_CV.at[columns_Q].set(p_QV, mode="drop")
