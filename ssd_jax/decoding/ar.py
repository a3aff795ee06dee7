"""Autoregressive decoding: one cell per pass, the law all others answer to."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.types import Model, Queries
from ssd_jax.decoding import sampling
from ssd_jax.decoding.engine import Context


@flax.struct.dataclass
class ARState:
  """One image's progress.

  Attributes:
    tokens: int32 [N].
    final: bool [N].
    next: int32 [], the first slot without a token.
  """

  tokens: jax.Array
  final: jax.Array
  next: jax.Array


@dataclasses.dataclass(frozen=True)
class AR:
  """One cell per pass; a forced slot rides along with the next query.

  Noise is keyed by slot, so that every lossless decoder that shares it can be
  held against these tokens cell by cell.
  """

  name = "ar"
  lossless = True

  def scratch(self, model: Model) -> int:
    """None."""
    return 0

  def start(
      self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array
  ) -> ARState:
    """State with cell 0 sampled from the prefill."""
    del hidden_GD
    grid = ctx.model.grid
    forced = jnp.asarray(grid.forced_tokens(ctx.model.vocab))
    state = ARState(
        jnp.maximum(forced, 0), jnp.asarray(grid.is_forced), jnp.int32(0)
    )
    return self._commit(ctx, state, p_V)

  def propose(self, ctx: Context, state: ARState) -> Queries:
    """The last committed slot, and the one before on end-of-row grids.

    Feeding a slot again rewrites the same key and value, so the number of
    queries is static.
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
    """State with the next cell sampled."""
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
