"""Autoregressive decoding: one token per pass, the reference distribution."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.protocols import DecoderBase
from ssd_jax.core.types import Queries
from ssd_jax.decoding import sampling
from ssd_jax.decoding.engine import Context


class ARState(flax.struct.PyTreeNode):
  """Decoding state of one image.

  Attributes:
    tokens: int32 [N], tokens generated so far.
    final: bool [N], which slots are final.
    next: int32 [], the first slot without a token.
  """

  tokens: jax.Array
  final: jax.Array
  next: jax.Array


@dataclasses.dataclass(frozen=True)
class AR(DecoderBase):
  """Generates one token per pass; a forced slot is fed with the next query.

  Noise is keyed by slot, so the output of every lossless decoder that shares
  this noise can be compared with AR's token by token.
  """

  name = "ar"
  lossless = True

  @property
  def has_fixed_passes(self) -> bool:
    """Whether all images of a grid take the same number of passes."""
    return True

  def start(
      self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array
  ) -> ARState:
    """Returns the state with token 0 sampled from the prefill."""
    del hidden_GD
    grid = ctx.model.grid
    forced = jnp.asarray(grid.forced_tokens(ctx.model.vocab))
    state = ARState(
        jnp.maximum(forced, 0), jnp.asarray(grid.is_forced), jnp.int32(0)
    )
    return self._commit(ctx, state, p_V)

  def propose(self, ctx: Context, state: ARState) -> Queries:
    """Returns the last committed slot and, on end-of-row grids, the one before.

    The second slot keeps the number of queries static: feeding a slot again
    rewrites the same key and value.
    """
    grid = ctx.model.grid
    count = 1 + int(grid.end_of_row)
    slots = state.next - count + jnp.arange(count)
    slots = jnp.maximum(slots, 0)
    return Queries(
        state.tokens[slots], slots, slots,
        jnp.arange(grid.length) <= slots[:, None],
    )

  def resolve(
      self, ctx: Context, state: ARState, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> ARState:
    """Returns the state with the next token sampled."""
    del queries, hidden_GQD
    return self._commit(ctx, state, p_QV[-1])

  def _commit(self, ctx: Context, state: ARState, p_V: jax.Array) -> ARState:
    noise_QV = ctx.token_noise(state.next[None])
    token = sampling.sample(p_V[None], noise_QV)[0]
    following = state.next + 1
    forced = jnp.asarray(ctx.model.grid.is_forced)
    skip = forced.at[following].get(mode="fill", fill_value=False)
    return ARState(
        state.tokens.at[state.next].set(token),
        state.final.at[state.next].set(True),
        following + skip,
    )
