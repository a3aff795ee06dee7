"""Drafts of rows that enter: drawn by spatial heads, or put in as stand-ins."""

import jax
import jax.numpy as jnp

from ssd_jax.core.grid import Grid
from ssd_jax.decoding import sampling as sampling_lib
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows.state import DRAFT, Rows

# (slots [Q] that a pass fed, N where none; hidden states [G, Q, D] there).
Fed = tuple[jax.Array, jax.Array]


def put_drafts(
    state: Rows, slots_K: jax.Array, index_K: jax.Array, drafts: Drafts,
    is_new: jax.Array,
) -> Rows:
  """State with drafts written where `is_new` (bool [K] or [])."""
  slots_K = jnp.where(is_new, slots_K, state.tokens.shape[0])
  index_K = jnp.where(is_new, index_K, state.q.shape[0])
  return state.replace(
      tokens=state.tokens.at[slots_K].set(drafts.tokens, mode="drop"),
      known=state.known.at[slots_K].set(True, mode="drop"),
      q=state.q.at[index_K].set(drafts.q, mode="drop"),
  )


def sample_drafts(
    ctx: Context, q_KV: jax.Array, slots_K: jax.Array, how: str,
    purpose: int = 0,
) -> Drafts:
  """Drafts from q: "sample", "coupled" (the slots' own noise) or "argmax"."""
  if how == "argmax":
    tokens_K = jnp.argmax(q_KV, axis=-1).astype(jnp.int32)
    q_KV = jax.nn.one_hot(tokens_K, q_KV.shape[-1])
  elif how == "coupled":
    tokens_K = sampling_lib.sample(q_KV, ctx.token_noise(slots_K))
  else:
    key = jax.random.fold_in(ctx.pass_key(DRAFT), purpose)
    tokens_K = sampling_lib.sample_inverse(q_KV, key)
  return Drafts(tokens_K, q_KV, jnp.zeros(slots_K.shape, bool))


def spread(
    ctx: Context, state: Rows, direction: str, offset: int,
    source: tuple[jax.Array, jax.Array], is_due: jax.Array,
) -> jax.Array:
  """float32 [K, V]: what the heads say about the cells `offset` further.

  Zeros, for nothing, in passes in which no image of the batch is due.

  Args:
    ctx: Of the pass.
    state: After it.
    direction: "horizontal" or "vertical".
    offset: In cells.
    source: (slots [K], states that predicted them [G, K, D]).
    is_due: bool [], whether it is asked for.
  """
  slots_K, hidden_GKD = source

  def say(params, sampling, hidden_GKD, tokens_K):
    tokens_GK = jnp.broadcast_to(tokens_K, hidden_GKD.shape[:2])
    logits_GKV = ctx.model.draft(
        params, direction, offset, hidden_GKD, tokens_GK)
    return sampling_lib.target(logits_GKV, sampling)

  return _when_due(is_due, say, ctx.params, ctx.sampling, hidden_GKD,
                   state.tokens[slots_K])


def _when_due(is_due: jax.Array, function, *args) -> jax.Array:
  """`function(*args)`, or zeros in passes in which it is due for no image.

  A `lax.cond` of one image becomes a select once images are a batch, and both
  sides run. Here the condition is the batch's.
  """

  def branch(function, is_due, args):
    out = jax.eval_shape(function, *args)
    zeros = lambda *_: jnp.zeros(out.shape, out.dtype)
    return jax.lax.cond(is_due, function, zeros, *args)

  @jax.custom_batching.custom_vmap
  def of_image(is_due, args):
    return branch(function, is_due, args)

  @of_image.def_vmap
  def of_batch(size, is_batched, is_due_B, args):
    del size
    axes = jax.tree.map(lambda batched: 0 if batched else None, is_batched[1])
    return branch(jax.vmap(function, axes), jnp.any(is_due_B), args), True

  return of_image(is_due, args)


def no_pass(grid: Grid, hidden_GD: jax.Array) -> Fed:
  """What the passes before the first have fed."""
  return jnp.full(1, grid.length), jnp.zeros_like(hidden_GD)[:, None]


def predictors(
    state: Rows, fed: Fed, cells_K: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """([G, K, D], bool [K]): states that predicted cells in a pass, which did."""
  slots_Q, hidden_GQD = fed
  size, length = slots_Q.shape[0], state.tokens.shape[0]
  query_N = jnp.full(length, size).at[slots_Q].set(
      jnp.arange(size), mode="drop"
  )
  query_K = query_N[jnp.maximum(cells_K - 1, 0)]
  hidden_GKD = hidden_GQD.at[:, query_K].get(mode="fill", fill_value=0.0)
  is_origin_K = cells_K == 0
  return (
      jnp.where(is_origin_K[:, None], state.hidden[:, None], hidden_GKD),
      is_origin_K | (query_K < size),
  )


def stand_in(
    grid: Grid, state: Rows, row: jax.Array, source: jax.Array,
    is_due: jax.Array,
) -> Rows:
  """State with a token in the slot before a row, where it has none.

  Only grids without end-of-row tokens need it, for rows that enter before the
  row above ends. It has no q: the cell counts as not drafted.

  Args:
    grid: Of the image.
    state: Of the image.
    row: The row that enters.
    source: Slot whose token stands in.
    is_due: bool [], whether the row enters.
  """
  slot = row * grid.row_slots - 1
  slot = jnp.where(is_due & ~state.known[slot], slot, grid.length)
  return state.replace(
      tokens=state.tokens.at[slot].set(state.tokens[source], mode="drop"),
      known=state.known.at[slot].set(True, mode="drop"),
  )
