"""Drafts of entering rows: sampled from spatial heads, or placeholders."""

import jax
import jax.numpy as jnp

from ssd_jax.core.grid import Grid
from ssd_jax.decoding import sampling as sampling_lib
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context, given_drafts
from ssd_jax.decoding.rows.state import DRAFT, Rows

# Slots [Q] that a pass fed, N where none, and their hidden states [G, Q, D].
Fed = tuple[jax.Array, jax.Array]


def put_drafts(
    state: Rows, slots_K: jax.Array, index_K: jax.Array, drafts: Drafts,
    is_new: jax.Array,
) -> Rows:
  """Writes drafts to the state where `is_new` holds.

  Args:
    state: State of the image.
    slots_K: Slots of the drafts.
    index_K: Window indices of the drafts.
    drafts: K drafts.
    is_new: bool [K] or [], which of them to write.
  """
  slots_K = jnp.where(is_new, slots_K, state.tokens.shape[0])
  index_K = jnp.where(is_new, index_K, state.q.shape[0])
  return state.replace(
      tokens=state.tokens.at[slots_K].set(drafts.tokens, mode="drop"),
      known=state.known.at[slots_K].set(True, mode="drop"),
      q=state.q.at[index_K].set(drafts.q, mode="drop"),
  )


def sample_drafts(
    ctx: Context, q_KV: jax.Array, slots_K: jax.Array, method: str,
    purpose: int = 0,
) -> Drafts:
  """Samples drafts from q.

  Args:
    ctx: Context of the pass.
    q_KV: Draft distributions.
    slots_K: Slots of the drafts.
    method: "sample", "coupled" (with the slots' own noise) or "argmax".
    purpose: Distinguishes the noise of several calls in one pass.
  """
  if method == "argmax":
    tokens_K = jnp.argmax(q_KV, axis=-1).astype(jnp.int32)
    q_KV = jax.nn.one_hot(tokens_K, q_KV.shape[-1])
  elif method == "coupled":
    tokens_K = sampling_lib.sample(q_KV, ctx.token_noise(slots_K))
  else:
    key = jax.random.fold_in(ctx.pass_key(DRAFT), purpose)
    tokens_K = sampling_lib.sample_inverse(q_KV, key)
  return Drafts(tokens_K, q_KV, jnp.zeros(slots_K.shape, bool))


def prefer_given(
    ctx: Context, drafts: Drafts, slots_K: jax.Array, is_used: bool
) -> Drafts:
  """Replaces drafts by those of the prompt, where it has any.

  Their q is the point mass: they were not sampled.

  Args:
    ctx: Context of the pass.
    drafts: K drafts.
    slots_K: Slots of the drafts.
    is_used: Whether the decoder uses the prompt's drafts at all.

  Raises:
    UserError: if it does, and the prompt has none.
  """
  if not is_used:
    return drafts
  given_K = given_drafts(ctx, "drafts").at[slots_K].get(
      mode="fill", fill_value=-1)
  is_given_K = given_K >= 0
  point_KV = jax.nn.one_hot(given_K, ctx.model.vocab)
  return Drafts(
      jnp.where(is_given_K, given_K, drafts.tokens),
      jnp.where(is_given_K[:, None], point_KV, drafts.q), drafts.is_point)


def head_distributions(
    ctx: Context, state: Rows, direction: str, offset: int,
    source: tuple[jax.Array, jax.Array], is_due: jax.Array,
) -> jax.Array:
  """Returns the heads' distributions of the positions `offset` further.

  In passes in which no image of the batch needs them, the heads do not run and
  the result is zero.

  Args:
    ctx: Context of the pass.
    state: State after the pass.
    direction: "horizontal" or "vertical".
    offset: Distance in grid positions.
    source: Slots [K], and the hidden states that predicted them [G, K, D].
    is_due: bool [], whether this image needs the distributions.

  Returns:
    float32 [K, V].
  """
  slots_K, hidden_GKD = source

  def predict(params, sampling, hidden_GKD, tokens_K):
    tokens_GK = jnp.broadcast_to(tokens_K, hidden_GKD.shape[:2])
    logits_GKV = ctx.model.draft(
        params, direction, offset, hidden_GKD, tokens_GK)
    return sampling_lib.target(logits_GKV, sampling)

  return _when_due(is_due, predict, ctx.params, ctx.sampling, hidden_GKD,
                   state.tokens[slots_K])


def _when_due(is_due: jax.Array, function, *args) -> jax.Array:
  """Returns `function(*args)`, or zeros if no image of the batch needs it.

  Under vmap, `lax.cond` on a per-image condition becomes a select that runs
  both branches; this condition is reduced over the batch instead.
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


def nothing_fed(grid: Grid, hidden_GD: jax.Array) -> Fed:
  """Returns the value of `Fed` before the first pass."""
  return jnp.full(1, grid.length), jnp.zeros_like(hidden_GD)[:, None]


def predicting_states(
    state: Rows, fed: Fed, slots_K: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Looks up the hidden states that predicted slots in the last pass.

  Args:
    state: State of the image.
    fed: Slots that the pass fed, and their hidden states.
    slots_K: Slots to look up.

  Returns:
    Hidden states [G, K, D], and which of them the pass computed, bool [K].
  """
  slots_Q, hidden_GQD = fed
  size, length = slots_Q.shape[0], state.tokens.shape[0]
  query_N = jnp.full(length, size).at[slots_Q].set(
      jnp.arange(size), mode="drop"
  )
  query_K = query_N[jnp.maximum(slots_K - 1, 0)]
  hidden_GKD = hidden_GQD.at[:, query_K].get(mode="fill", fill_value=0.0)
  is_origin_K = slots_K == 0
  return (
      jnp.where(is_origin_K[:, None], state.hidden[:, None], hidden_GKD),
      is_origin_K | (query_K < size),
  )


def put_placeholder(
    grid: Grid, state: Rows, row: jax.Array, source: jax.Array,
    is_due: jax.Array,
) -> Rows:
  """Copies a token to the slot before a row, if that slot holds none.

  This is needed only on grids without end-of-row tokens, for rows that enter
  before the row above ends. The placeholder has no q, so its slot counts as not
  drafted.

  Args:
    grid: The image as a sequence.
    state: State of the image.
    row: The row that enters.
    source: Slot whose token is copied.
    is_due: bool [], whether the row enters.
  """
  slot = row * grid.row_slots - 1
  slot = jnp.where(is_due & ~state.known[slot], slot, grid.length)
  return state.replace(
      tokens=state.tokens.at[slot].set(state.tokens[source], mode="drop"),
      known=state.known.at[slot].set(True, mode="drop"),
  )
