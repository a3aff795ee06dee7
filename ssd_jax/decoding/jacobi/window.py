"""The window that slides along the raster, shared by the Jacobi decoders.

A window of W queries starts at the last final slot: a pass feeds that slot and
W - 1 drafts, and predicts the targets of W slots. The accepted prefix of the
drafts becomes final; the first rejected draft is resampled from the residual
and becomes final too; the slots after it stay drafts, resampled from their new
targets.

This is lossless whatever the drafts are: the token of a slot in a pass depends
on the slot's own noise and on the slots before it, and conditioned on their
history it is a sample from the slot's latest target. In which passes a slot is
fed, and when it becomes final, depends only on the slots before it.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import check
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import DecoderBase, Needs
from ssd_jax.core.types import Model, Queries
from ssd_jax.decoding import acceptance, fan as fan_lib, sampling
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.fan import Fan
from ssd_jax.decoding.jacobi import initial_drafts

TAILS = ("full", "reference")
_TEST_PURPOSE, _RESAMPLE_PURPOSE = 0, 1
_GUESS_PURPOSE, _TEST_BEHIND, _RESAMPLE_BEHIND = 4, 5, 6


class JacobiState(flax.struct.PyTreeNode):
  """Decoding state of one image; its drafts start at the slot `next`.

  Attributes:
    tokens: int32 [N], drafts included.
    final: bool [N], which slots are final.
    next: int32 [], the first slot that is not final, or forced.
    q: float32 [Q - 1, V], the distribution of each draft.
    is_point: bool [Q - 1], drafts that were copied, not sampled.
    above: float32 [row slots, V], the latest target of each column, or None
      if no drafts are sampled from it.
    guess: int32 [], which guess of slot `next` - 2 was right in the last pass;
      K if none. None without a fan.
  """

  tokens: jax.Array
  final: jax.Array
  next: jax.Array
  q: jax.Array
  is_point: jax.Array
  above: jax.Array | None
  guess: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Jacobi(DecoderBase):
  """Base class of the one-dimensional Jacobi decoders.

  Attributes:
    window: Queries W of a pass, forced slots included; queries beyond the end
      of the image are inactive. 1 is AR decoding, token for token.
    init: How slots that enter the window are drafted, one of
      `initial_drafts.INITS`.
    tail: "full" uses windows up to the end; "reference" generates the last
      W + 2 slots one by one, as the published code for LlamaGen does.
    fan: Tokens fed for the first open slot, its draft included. If the draft is
      rejected and its successor is among the others, two tokens become final;
      see `decoding.fan`. Costs fan - 1 queries.
  """

  window: int = 16
  init: str = "random"
  tail: str = "full"
  fan: int = dataclasses.field(default=1, kw_only=True)

  acceptance = "exact"
  coupling = "none"

  def __post_init__(self):
    check(self.window >= 1, "window", self.window, ">= 1")
    check(self.init in initial_drafts.INITS, "init", self.init,
          f"one of {', '.join(initial_drafts.INITS)}")
    check(self.tail in TAILS, "tail", self.tail, f"one of {', '.join(TAILS)}")
    most = "1 with window=1, which has no drafts"
    check(self.fan >= 1, "fan", self.fan, ">= 1")
    check(self.fan == 1 or self.window > 1, "fan", self.fan, most)

  @property
  def lossless(self) -> bool:
    """Whether the output is AR's: it is, for any drafts."""
    return True

  def needs(self, model: Model) -> Needs:
    """Returns the preview if slots are drafted from it."""
    return Needs(preview=self.init == "preview")

  def num_queries(self, grid: Grid) -> int:
    """Returns the queries of a pass; a forced slot needs a second query."""
    return min(max(self.window, 1 + int(grid.end_of_row)), grid.length)

  def scratch(self, model: Model) -> int:
    """Returns one slot for each guess."""
    return fan_lib.num_guesses(self.fan, model.vocab)

  def start(
      self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array
  ) -> JacobiState:
    """Returns the state with token 0 sampled from the prefill and drafts."""
    del hidden_GD
    grid, vocab = ctx.model.grid, ctx.model.vocab
    forced_N = jnp.asarray(grid.forced_tokens(vocab))
    keeps_above = self.init == "sample_above"
    state = JacobiState(
        jnp.maximum(forced_N, 0), forced_N >= 0, jnp.int32(0),
        jnp.zeros((self.num_queries(grid) - 1, vocab)),
        jnp.zeros(self.num_queries(grid) - 1, bool),
        jnp.zeros((grid.row_slots, vocab)) if keeps_above else None,
        jnp.int32(self.fan - 1) if self.fan > 1 else None,
    )
    slots_1 = state.next[None]
    token_1 = sampling.sample(p_V[None], ctx.token_noise(slots_1))
    return self._advance(ctx, state, token_1, p_V[None], jnp.int32(1))

  def propose(self, ctx: Context, state: JacobiState) -> Queries:
    """Returns the last final slot and the drafts that follow it."""
    grid = ctx.model.grid
    slots_Q = state.next - 1 + jnp.arange(self.num_queries(grid))
    # The last slot predicts nothing.
    is_active_Q = slots_Q < grid.length - 1
    positions_Q = jnp.minimum(slots_Q, grid.length - 1)
    queries = Queries(
        state.tokens[positions_Q], positions_Q,
        jnp.where(is_active_Q, slots_Q, grid.length),
        jnp.arange(grid.length) <= positions_Q[:, None],
    )
    if self.fan == 1:
      return queries
    return fan_lib.append(queries, self._guesses(ctx, state))

  def resolve(
      self, ctx: Context, state: JacobiState, queries: Queries,
      p_QV: jax.Array, hidden_GQD: jax.Array,
  ) -> JacobiState:
    """Verifies the drafts, shifts the window and drafts its new slots."""
    del queries, hidden_GQD
    grid, size = ctx.model.grid, self.num_queries(ctx.model.grid)
    p_QV, p_KV = p_QV[:size], p_QV[size:]
    slots_Q = state.next + jnp.arange(size)
    is_forced_Q = _is_forced(grid, slots_Q)
    is_tested_Q = ~is_forced_Q & (jnp.arange(size) < size - 1)
    is_tested_Q &= ~self._generates_one(grid, state.next)
    drafts = Drafts(
        state.tokens[jnp.minimum(slots_Q[:-1], grid.length - 1)],
        state.q, state.is_point,
    )
    test = self._test_equality if self.acceptance == "equality" else self._test
    accepted_Q, tokens_Q = test(ctx, slots_Q, p_QV, drafts, is_tested_Q)
    count = acceptance.count_prefix(is_forced_Q | accepted_Q)
    if self.fan > 1:
      tokens_Q, guess = self._resample_first(
          ctx, self._guesses(ctx, state), drafts, is_tested_Q, accepted_Q,
          p_QV, p_KV, tokens_Q)
      count += guess < self.fan - 1
      state = state.replace(guess=guess)
    following = state.next + jnp.minimum(count + 1, size)
    following = jnp.minimum(following, grid.length)
    return self._advance(ctx, state, tokens_Q, p_QV, following)

  def settle(
      self, ctx: Context, state: JacobiState
  ) -> tuple[jax.Array, jax.Array] | None:
    """Moves a right guess to the slot whose rejected draft was fed."""
    if state.guess is None:
      return None
    length, guesses = ctx.model.grid.length, self.fan - 1
    is_right = state.guess < guesses
    target = jnp.where(is_right, state.next - 2, length + guesses)
    return (length + state.guess)[None], target[None]

  def accept(
      self, ctx: Context, p_QV: jax.Array, drafts: Drafts, u_Q: jax.Array
  ) -> jax.Array:
    """Returns which drafts are accepted, bool [Q]."""
    del ctx
    return acceptance.accept_exact(p_QV, drafts, u_Q)

  def _guesses(self, ctx: Context, state: JacobiState) -> Fan:
    """Returns the guesses of the first open slot."""
    first = state.next + _is_forced(ctx.model.grid, state.next)
    at = first - state.next
    if self.acceptance == "equality":
      noise_1V = ctx.token_noise(first[None])
    else:
      shape = (1, ctx.model.vocab)
      noise_1V = jax.random.gumbel(ctx.pass_key(_GUESS_PURPOSE), shape)
    draft = state.tokens[jnp.minimum(first, ctx.model.grid.length - 1)]
    return fan_lib.guess(
        first[None], draft[None], state.q[at][None], noise_1V, self.fan - 1)

  def _resample_first(
      self, ctx: Context, fan: Fan, drafts: Drafts, is_tested_Q: jax.Array,
      accepted_Q: jax.Array, p_QV: jax.Array, p_KV: jax.Array,
      tokens_Q: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Resamples a rejected first draft with the fan's noise.

    If the new token was guessed, the draft behind it is tested with the guess's
    target.

    Returns:
      The tokens, int32 [Q], and which guess was right, int32 []; K if none.
    """
    first = jnp.argmax(is_tested_Q)  # behind a forced slot
    behind, last = first + 1, fan.tokens.shape[1] - 1
    row = jax.lax.dynamic_index_in_dim
    draft_at = lambda at: jax.tree.map(lambda x: row(x, at), drafts)
    left_1V = row(p_QV, first)
    if self.acceptance != "equality":
      left_1V = acceptance.residual(left_1V, draft_at(first))
    token_1, guess_1 = fan.resample(left_1V)
    is_new = is_tested_Q[first] & ~accepted_Q[first]
    is_right = is_new & (guess_1[0] <= last) & is_tested_Q.at[behind].get(
        mode="fill", fill_value=False)
    token_behind_1 = self._sample_behind(
        ctx, fan, row(p_KV, jnp.minimum(guess_1[0], last)), draft_at(behind))
    put = lambda is_put, at, token_1: tokens_Q.at[
        jnp.where(is_put, at, tokens_Q.shape[0])].set(token_1[0], mode="drop")
    tokens_Q = put(is_new, first, token_1)
    return (put(is_right, behind, token_behind_1),
            jnp.where(is_right, guess_1[0], last + 1).astype(jnp.int32))

  def _sample_behind(
      self, ctx: Context, fan: Fan, p_1V: jax.Array, draft: Drafts
  ) -> jax.Array:
    """Returns the token behind a right guess, int32 [1]."""
    if self.acceptance == "equality":
      return sampling.sample(p_1V, ctx.token_noise(fan.slots + 1))
    u_1 = jax.random.uniform(ctx.pass_key(_TEST_BEHIND), (1,))
    resampled_1 = sampling.sample_inverse(
        acceptance.residual(p_1V, draft), ctx.pass_key(_RESAMPLE_BEHIND))
    is_accepted_1 = self.accept(ctx, p_1V, draft, u_1)
    return jnp.where(is_accepted_1, draft.tokens, resampled_1)

  def _generates_one(self, grid: Grid, following: jax.Array) -> jax.Array:
    """Returns whether to ignore the drafts and generate one token, bool []."""
    if self.window == 1:
      return jnp.bool_(True)
    if self.tail == "full":
      return jnp.bool_(False)
    return following >= grid.length - min(self.window, grid.length) - 2

  def _test_equality(
      self, ctx: Context, slots_Q: jax.Array, p_QV: jax.Array, drafts: Drafts,
      is_tested_Q: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Accepts a draft if its slot's own noise selects the same token again.

    Returns:
      Which slots' drafts are accepted, bool [Q], and the tokens, int32 [Q].
    """
    tokens_Q = sampling.sample(p_QV, ctx.token_noise(slots_Q))
    same_Q = _pad(drafts.tokens == tokens_Q[:-1])
    return is_tested_Q & same_Q, tokens_Q

  def _test(
      self, ctx: Context, slots_Q: jax.Array, p_QV: jax.Array, drafts: Drafts,
      is_tested_Q: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Tests the drafts with `accept` and resamples the others.

    Returns:
      Which slots' drafts are accepted, bool [Q], and the tokens, int32 [Q].
    """
    u_Q = jax.random.uniform(
        ctx.pass_key(_TEST_PURPOSE), drafts.tokens.shape
    )
    accepted_Q = _pad(self.accept(ctx, p_QV[:-1], drafts, u_Q)) & is_tested_Q
    rejected_Q = is_tested_Q & ~accepted_Q
    if self.coupling != "maximal":
      # Only the first rejected draft uses the residual; later slots are
      # sampled from their targets.
      is_prefix_Q = jnp.cumsum(rejected_Q) == 0
      rejected_Q &= jnp.cumsum(rejected_Q) == 1
      accepted_Q &= is_prefix_Q
    dist_QV = jnp.concatenate(
        [acceptance.residual(p_QV[:-1], drafts), p_QV[-1:]]
    )
    dist_QV = jnp.where(rejected_Q[:, None], dist_QV, p_QV)
    # Resampling must not reuse the noise of the rejected draft. A slot without
    # a tested draft may use AR's noise.
    is_shared_Q = ~rejected_Q if self.coupling == "gumbel" else ~is_tested_Q
    resampled_Q = jnp.where(
        is_shared_Q,
        sampling.sample(dist_QV, ctx.token_noise(slots_Q)),
        sampling.sample_inverse(dist_QV, ctx.pass_key(_RESAMPLE_PURPOSE)),
    )
    return accepted_Q, jnp.where(accepted_Q, _pad(drafts.tokens), resampled_Q)

  def _advance(
      self, ctx: Context, state: JacobiState, tokens_Q: jax.Array,
      p_QV: jax.Array, following: jax.Array,
  ) -> JacobiState:
    """Writes the slots from `next` on and moves `next` to `following`."""
    grid = ctx.model.grid
    slots_Q = state.next + jnp.arange(tokens_Q.shape[0])
    tokens_N = _write(grid, state.tokens, slots_Q, tokens_Q)
    above = state.above
    if above is not None:
      above = _write_columns(grid, above, slots_Q, p_QV)
    # Slots sampled in this pass that are not final are drafts from their p.
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
        is_fresh_D & first.is_point, above, state.guess,
    )


def _is_forced(grid: Grid, slots_Q: jax.Array) -> jax.Array:
  """Returns which slots are forced slots of the image, bool [Q]."""
  forced_N = jnp.asarray(grid.is_forced)
  return forced_N.at[slots_Q].get(mode="fill", fill_value=False)


def _pad(x_D: jax.Array) -> jax.Array:
  """Appends a zero for the last target, which has no draft: [D + 1]."""
  return jnp.pad(x_D, (0, 1))


def _write(
    grid: Grid, tokens_N: jax.Array, slots_Q: jax.Array, tokens_Q: jax.Array
) -> jax.Array:
  """Writes tokens to the slots that are not forced, int32 [N]."""
  nowhere = grid.length
  slots_Q = jnp.where(_is_forced(grid, slots_Q), nowhere, slots_Q)
  return tokens_N.at[slots_Q].set(tokens_Q, mode="drop")


def _write_columns(
    grid: Grid, above_CV: jax.Array, slots_Q: jax.Array, p_QV: jax.Array
) -> jax.Array:
  """Stores each column's lowest new target, float32 [row slots, V]."""
  is_kept_Q = (slots_Q < grid.length) & (slots_Q > slots_Q[-1] - grid.row_slots)
  columns_Q = jnp.where(is_kept_Q, slots_Q % grid.row_slots, grid.row_slots)
  return above_CV.at[columns_Q].set(p_QV, mode="drop")
