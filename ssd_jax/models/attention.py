"""Attention over the cache, and what writes it."""

import jax
import jax.numpy as jnp


def attend(
    q_SQNH: jax.Array, k_SKXH: jax.Array, v_SKXH: jax.Array,
    visible_SQX: jax.Array,
) -> jax.Array:
  """[S, Q, N, H]: grouped-query attention, softmax in float32.

  Every pass reads the whole cache once. Heads stand before slots in it, so that
  each head is one contiguous product: with slots first XLA turns the cache
  around in every pass, which made an AR pass on a CPU 2.4 times as long.
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
  """[L, S, K, X, H]: the cache with slots of a layer set; those out of range
  are dropped.

  Rows are a batch of the scatter and not indices of it, so that devices that
  share rows write their own without asking others.
  """
  places = jax.lax.ScatterDimensionNumbers(
      update_window_dims=(2, 3), inserted_window_dims=(0, 3),
      scatter_dims_to_operand_dims=(0, 3), operand_batching_dims=(1,),
      scatter_indices_batching_dims=(0,))
  at_SQ2 = jnp.stack([jnp.full_like(slots_SQ, layer), slots_SQ], axis=-1)
  return jax.lax.scatter(
      cache_LSKXH, at_SQ2, new_SQKH.astype(cache_LSKXH.dtype), places,
      mode=jax.lax.GatherScatterMode.FILL_OR_DROP)
