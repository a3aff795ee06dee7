"""Attention over the cache, and the update of the cache."""

import jax
import jax.numpy as jnp


def attend(
    q_SQNH: jax.Array, k_SKXH: jax.Array, v_SKXH: jax.Array,
    visible_SQX: jax.Array,
) -> jax.Array:
  """Computes grouped-query attention with a float32 softmax, [S, Q, N, H].

  Every pass reads the whole cache once. In the cache the head axis precedes the
  slot axis, so that each head is one contiguous matmul: with slots first, XLA
  transposes the cache in every pass, which made an AR pass on a CPU 2.4 times
  as long.

  Args:
    q_SQNH: Queries.
    k_SKXH: Keys.
    v_SKXH: Values.
    visible_SQX: bool, which slots each query sees.
  """
  streams, queries, heads, width = q_SQNH.shape
  groups = heads // k_SKXH.shape[1]
  q_SNQH = jnp.swapaxes(q_SQNH, 1, 2)
  q_SKTH = q_SNQH.reshape(streams, -1, groups * queries, width)
  logits = jnp.einsum(
      "skth,skxh->sktx", q_SKTH, k_SKXH, preferred_element_type=jnp.float32)
  logits = logits.reshape(streams, -1, groups, queries, k_SKXH.shape[2])
  logits = jnp.where(
      visible_SQX[:, None, None], logits * width**-0.5,
      jnp.finfo(jnp.float32).min)
  p = jax.nn.softmax(logits, axis=-1).astype(v_SKXH.dtype)
  p_SKTX = p.reshape(streams, -1, groups * queries, k_SKXH.shape[2])
  y_SNQH = jnp.einsum("sktx,skxh->skth", p_SKTX, v_SKXH).reshape(q_SNQH.shape)
  return jnp.swapaxes(y_SNQH, 1, 2)


def update_cache(
    cache_LSKXH: jax.Array, layer: jax.Array, slots_SQ: jax.Array,
    new_SQKH: jax.Array,
) -> jax.Array:
  """Writes slots of one layer to the cache; slots out of range are dropped.

  Rows are a batch dimension of the scatter, not an index of it, so devices that
  share rows write their own rows without communication.

  Args:
    cache_LSKXH: Keys or values of all layers.
    layer: Index of the layer.
    slots_SQ: Slots to write.
    new_SQKH: Their keys or values.

  Returns:
    The cache, [L, S, K, X, H].
  """
  dimensions = jax.lax.ScatterDimensionNumbers(
      update_window_dims=(2, 3), inserted_window_dims=(0, 3),
      scatter_dims_to_operand_dims=(0, 3), operand_batching_dims=(1,),
      scatter_indices_batching_dims=(0,))
  at_SQ2 = jnp.stack([jnp.full_like(slots_SQ, layer), slots_SQ], axis=-1)
  return jax.lax.scatter(
      cache_LSKXH, at_SQ2, new_SQKH.astype(cache_LSKXH.dtype),
      dimensions, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)
