"""One-dimensional multi-token prediction: horizontal heads draft next tokens.

Offsets of drafts count image tokens and may cross row ends. A forced slot in
between is known, so it is fed as a query without using up a draft; an offset
counted in slots would spend a head on it.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError, check
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import DecoderBase, Needs
from ssd_jax.core.types import Model, Queries
from ssd_jax.decoding import acceptance, sampling
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context

VERIFY = ("exact", "coupled", "correct")
_DEFAULT_HEADS = 5
_DRAFT, _TEST, _RESAMPLE = 0, 1, 2  # purposes of a pass's noise


class MTPState(flax.struct.PyTreeNode):
  """Decoding state of one image.

  Attributes:
    tokens: int32 [N], drafts included.
    final: bool [N], which slots are final.
    last: int32 [], raster index of the image token before the drafts: it is
      final, but has not been fed.
    count: int32 [], number of drafts after it.
    q: float32 [K, V], distribution that each draft was last sampled from.
    round: int32 [], correction rounds that the drafts went through.
  """

  tokens: jax.Array
  final: jax.Array
  last: jax.Array
  count: jax.Array
  q: jax.Array
  round: jax.Array


@dataclasses.dataclass(frozen=True)
class MTP(DecoderBase):
  """Horizontal heads draft `horizontal` tokens, which one pass verifies.

  Attributes:
    horizontal: Drafts K per pass; None for 5, or as many as there are heads.
    verify: "exact" keeps the accepted prefix and resamples the first rejected
      draft: lossless. "coupled" does so with the noise of each slot and so
      generates AR's tokens. "correct" resamples every rejected draft
      independently and keeps all of them after `rounds` passes and one that
      commits them: lossy.
    rounds: Correction rounds of "correct"; None for 1.
    cross_rows: Whether drafts continue across row ends. A published baseline
      on grids with end-of-row tokens starts over in each row.

  Source: the 1D-MTP baseline of SSD, arXiv:2606.20543, tables 1 and 2.
  """

  horizontal: int | None = None
  verify: str = "exact"
  rounds: int | None = None
  cross_rows: bool = True

  name = "mtp"

  def __post_init__(self):
    check(self.verify in VERIFY, "verify", repr(self.verify),
          f"one of {VERIFY}")
    check(self.rounds is None or self.rounds >= 0, "rounds", self.rounds,
          ">= 0")
    check(self.rounds is None or self.verify == "correct", "rounds",
          self.rounds, "none, or verify=correct")
    check(self.horizontal is None or self.horizontal >= 1, "horizontal",
          self.horizontal, ">= 1")

  @property
  def lossless(self) -> bool:
    """Whether rejected drafts are not corrected independently."""
    return self.verify != "correct"

  def needs(self, model: Model) -> Needs:
    """Returns the horizontal heads that drafts are made with."""
    return Needs(horizontal=True)

  def start(
      self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array
  ) -> MTPState:
    """Returns the state with token 0 sampled from the prefill, and drafts."""
    grid, vocab = ctx.model.grid, ctx.model.vocab
    tokens_N = jnp.maximum(jnp.asarray(grid.forced_tokens(vocab)), 0)
    first = self._sample_first(ctx, p_V, jnp.int32(0))
    state = MTPState(
        tokens_N.at[0].set(first),
        jnp.asarray(grid.is_forced).at[0].set(True),
        jnp.int32(0), jnp.int32(0),
        jnp.zeros((self._num_drafts(ctx.model), vocab)), jnp.int32(0),
    )
    return self._draft(ctx, state, hidden_GD)

  def propose(self, ctx: Context, state: MTPState) -> Queries:
    """Returns the slots from the last final token to the last draft.

    If a forced slot follows the last draft, it is included.
    """
    grid = ctx.model.grid
    slots = _slots(grid, state.last) + jnp.arange(self._queries(ctx.model))
    following = _slots(grid, state.last + state.count + 1)
    is_active = slots < jnp.minimum(following, grid.length)
    slots = jnp.minimum(slots, grid.length - 1)
    return Queries(
        state.tokens[slots], slots, jnp.where(is_active, slots, grid.length),
        jnp.arange(grid.length) <= slots[:, None],
    )

  def resolve(
      self, ctx: Context, state: MTPState, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> MTPState:
    """Returns the state with drafts verified or corrected, and new drafts."""
    size = self._num_drafts(ctx.model)
    grid = ctx.model.grid
    # The queries that predict each draft and the token after the last one.
    index_K = state.last + 1 + jnp.arange(size + 1)
    source = _slots(grid, index_K) - 1 - queries.positions[0]
    p_KV = p_QV[jnp.clip(source, 0, p_QV.shape[0] - 1)]
    if self.verify == "correct":
      return self._correct(ctx, state, p_KV, source, hidden_GQD)
    return self._keep_prefix(ctx, state, p_KV, source, hidden_GQD)

  def _keep_prefix(
      self, ctx: Context, state: MTPState, p_KV: jax.Array, source: jax.Array,
      hidden_GQD: jax.Array,
  ) -> MTPState:
    """Commits the accepted prefix and one more token."""
    slots, drafts, exists = self._current_drafts(ctx, state)
    if self.verify == "coupled":
      resampled = sampling.sample(p_KV, ctx.token_noise(slots))
      accept = drafts.tokens == resampled
    else:
      u = jax.random.uniform(ctx.pass_key(_TEST), slots.shape)
      accept = acceptance.accept_exact(p_KV, drafts, u)
      resampled = self._resample(ctx, p_KV, drafts, exists)
    kept = acceptance.count_prefix(accept & exists)
    # Replaces the rejected draft, or adds the token after the last draft.
    tokens = state.tokens.at[_at(slots, kept, ctx.model.grid)].set(
        resampled[kept], mode="drop")
    return self._finalize(
        ctx, state.replace(tokens=tokens), kept + 1, source, hidden_GQD
    )

  def _correct(
      self, ctx: Context, state: MTPState, p_KV: jax.Array, source: jax.Array,
      hidden_GQD: jax.Array,
  ) -> MTPState:
    """Runs a correction round, or commits the drafts after the last round."""
    slots, drafts, exists = self._current_drafts(ctx, state)
    u = jax.random.uniform(ctx.pass_key(_TEST), slots.shape)
    accept = acceptance.accept_exact(p_KV, drafts, u)
    resampled = self._resample(ctx, p_KV, drafts, exists)
    # Without drafts (at a row's end) the pass generates one token, as in AR.
    is_single = state.count == 0
    first = jnp.arange(slots.size) == 0
    is_new = jnp.where(is_single, first, exists & ~accept)
    write = jnp.where(is_new, slots, ctx.model.grid.length)
    corrected = state.replace(
        tokens=state.tokens.at[write].set(resampled, mode="drop"),
        q=p_KV[:-1], round=state.round + 1,
    )
    committed = self._finalize(
        ctx, _choose(is_single, corrected, state),
        jnp.maximum(state.count, 1), source, hidden_GQD,
    )
    rounds = 1 if self.rounds is None else self.rounds
    is_over = is_single | (state.round >= rounds)
    return _choose(is_over, committed, corrected)

  def _finalize(
      self, ctx: Context, state: MTPState, count: jax.Array,
      source: jax.Array, hidden_GQD: jax.Array,
  ) -> MTPState:
    """Makes `count` more tokens final and drafts the tokens after them."""
    grid = ctx.model.grid
    count = jnp.minimum(count, grid.num_tokens - 1 - state.last)
    index = jnp.arange(grid.num_tokens)
    is_new = (index > state.last) & (index <= state.last + count)
    slots = jnp.where(is_new, grid.slot_of.ravel(), grid.length)
    hidden_GD = hidden_GQD[:, source[jnp.maximum(count - 1, 0)]]
    state = state.replace(
        final=state.final.at[slots].set(True, mode="drop"),
        last=state.last + count, round=jnp.int32(0),
    )
    return self._draft(ctx, state, hidden_GD)

  def _draft(
      self, ctx: Context, state: MTPState, hidden_GD: jax.Array
  ) -> MTPState:
    """Drafts the tokens after `last`, whose predicting state is `hidden`."""
    grid, size = ctx.model.grid, self._num_drafts(ctx.model)
    room = grid.num_tokens - 1 - state.last
    if not self.cross_rows:
      room = grid.cols - 1 - state.last % grid.cols
    token_G = jnp.broadcast_to(
        state.tokens[_slots(grid, state.last)], hidden_GD.shape[:1]
    )
    logits_KGV = ctx.model.draft(
        ctx.params, "horizontal", None, hidden_GD, token_G
    )[:size]
    q_KV = ctx.target(jnp.moveaxis(logits_KGV, 1, 0))
    slots = _slots(grid, state.last + 1 + jnp.arange(size))
    if self.verify == "coupled":
      drafts = sampling.sample(q_KV, ctx.token_noise(slots))
    else:
      drafts = sampling.sample_inverse(q_KV, ctx.pass_key(_DRAFT))
    count = jnp.minimum(room, size)
    write = jnp.where(jnp.arange(size) < count, slots, grid.length)
    return state.replace(
        tokens=state.tokens.at[write].set(drafts, mode="drop"),
        count=count, q=q_KV,
    )

  def _current_drafts(
      self, ctx: Context, state: MTPState
  ) -> tuple[jax.Array, Drafts, jax.Array]:
    """Returns slots [K + 1], drafts and which exist, for K drafts and one more.

    The last entry is the token after the last draft.
    """
    size = self._num_drafts(ctx.model)
    index = jnp.arange(size + 1)
    slots = _slots(ctx.model.grid, state.last + 1 + index)
    tokens = state.tokens.at[slots].get(mode="fill", fill_value=0)
    q = jnp.concatenate([state.q, jnp.zeros_like(state.q[:1])])
    return (slots, Drafts(tokens, q, jnp.zeros(size + 1, bool)),
            index < state.count)

  def _resample(self, ctx, p_KV, drafts: Drafts, exists) -> jax.Array:
    """Samples from the residual, or from p without a draft, int32 [K + 1]."""
    left_KV = jnp.where(
        exists[:, None], acceptance.residual(p_KV, drafts), p_KV
    )
    return sampling.sample_inverse(left_KV, ctx.pass_key(_RESAMPLE))

  def _sample_first(self, ctx: Context, p_V: jax.Array, slot) -> jax.Array:
    if self.verify == "coupled":
      return sampling.sample(p_V[None], ctx.token_noise(slot[None]))[0]
    return sampling.sample_inverse(p_V[None], ctx.pass_key(_RESAMPLE))[0]

  def _num_drafts(self, model: Model) -> int:
    """Returns the number of drafts K per pass."""
    heads = model.heads[0]
    if not heads:
      raise UserError(
          "Expected a model with at least one horizontal head for decoder mtp, "
          "got a model without horizontal heads. Train heads with train.mtp or "
          "choose another decoder."
      )
    check((self.horizontal or 1) <= heads, "horizontal", self.horizontal,
          f"at most the {heads} horizontal heads of the model")
    return self.horizontal or min(_DEFAULT_HEADS, heads)

  def _queries(self, model: Model) -> int:
    """Returns the static number of queries: K + 1 tokens and forced slots."""
    tokens, grid = self._num_drafts(model) + 1, model.grid
    return tokens + int(grid.end_of_row) * -(-tokens // grid.cols)


def _slots(grid: Grid, index: jax.Array) -> jax.Array:
  """Returns the slots of raster indices; N and beyond after the image."""
  return index // grid.cols * grid.row_slots + index % grid.cols


def _at(slots: jax.Array, index: jax.Array, grid: Grid) -> jax.Array:
  return jnp.minimum(slots[index], grid.length)


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
