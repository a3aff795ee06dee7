"""The target distribution of logits, and sampling from distributions.

Order, for every family: guidance, temperature, top-k (ties are kept), top-p,
softmax. Thresholds are found by bisection, not by sorting.

Token noise is keyed by (seed, image, slot) alone, so all decoders use the same
noise for a slot and can be compared token by token. The noise of acceptance
tests and of resampling is also keyed by the pass; reusing it would bias the
output distribution.
"""

import dataclasses
from typing import TypedDict

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.runtime import sharding

BISECTIONS = 32  # as many as a float32 has bits, so the result is exact


class Overrides(TypedDict, total=False):
  """Sampling settings of a call; None selects the model's default."""

  guidance: float | None
  temperature: float | None
  top_k: int | None
  top_p: float | None


@flax.struct.dataclass
class Sampling:
  """Settings of the target distribution; changing a number does not recompile.

  Attributes:
    guidance: Scale s of u + s (c - u); unused with a single stream.
    temperature: Divides the logits.
    top_k: Number of largest logits kept; 0 keeps all.
    top_p: Least probability mass kept; 1 keeps all.
    use_top_k: Whether top_k is applied at all (static).
    use_top_p: Whether top_p is applied at all (static).

  Each number may have leading axes, those of what it is used for: [B] for the
  images of a batch.
  """

  guidance: jax.Array
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  use_top_k: bool = flax.struct.field(pytree_node=False, default=False)
  use_top_p: bool = flax.struct.field(pytree_node=False, default=False)

  @classmethod
  def make(
      cls, guidance: float = 1.0, temperature: float = 1.0, top_k: int = 0,
      top_p: float = 1.0,
  ) -> "Sampling":
    """Returns settings from numbers; top_k 0 and top_p 1 mean no filter."""
    return cls(
        jnp.float32(guidance), jnp.float32(temperature), jnp.int32(top_k),
        jnp.float32(top_p), top_k > 0, top_p < 1.0,
    )

  def with_filters(self) -> "Sampling":
    """Returns settings whose programs serve any top-k and top-p."""
    return dataclasses.replace(self, use_top_k=True, use_top_p=True)

  def repeat(self, batch: int) -> "Sampling":
    """Returns the settings of each image, [B]."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch,)), self)


def guide(logits_GV: jax.Array, guidance: jax.Array) -> jax.Array:
  """Applies guidance to stacked streams [G, ..., V]; float32 [..., V]."""
  logits_GV = logits_GV.astype(jnp.float32)
  if logits_GV.shape[0] == 1:
    return logits_GV[0]
  cond, uncond = logits_GV
  return uncond + _before(guidance, cond) * (cond - uncond)


def _before(x: jax.Array, logits: jax.Array) -> jax.Array:
  """Appends axes, so that x broadcasts against logits with its leading axes."""
  x = jnp.asarray(x)
  return x.reshape(x.shape + (1,) * (logits.ndim - x.ndim))


def target(logits_GV: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns the distribution to sample from.

  Args:
    logits_GV: [G, ..., V], conditional first, then unconditional if G is 2.
    sampling: Guidance, temperature and filters.

  Returns:
    float32 [..., V], probabilities.
  """
  logits = guide(sharding.replicate_axis(logits_GV, axis=0), sampling.guidance)
  logits /= _before(jnp.maximum(sampling.temperature, 1e-5), logits)
  if sampling.use_top_k:
    logits = keep_top_k(logits, sampling.top_k)
  if sampling.use_top_p:
    logits = keep_top_p(logits, sampling.top_p)
  return jax.nn.softmax(logits, axis=-1)


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
  """Sets logits below the k-th largest to -inf; ties with it are kept.

  If k is 0, all are kept.
  """
  k = _before(jnp.where(k > 0, k, jnp.iinfo(jnp.int32).max), logits)
  enough = lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= k
  return _keep_above_threshold(logits, enough)


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
  """Keeps the smallest set of largest logits whose mass is at least p.

  If p is 1, all are kept, whatever the rounding of their sum.
  """
  p = _before(jnp.where(p < 1.0, p, jnp.inf), logits)
  probs = jax.nn.softmax(logits, axis=-1)
  enough = lambda kept: (
      jnp.sum(jnp.where(kept, probs, 0.0), axis=-1, keepdims=True) >= p
  )
  return _keep_above_threshold(logits, enough)


def _keep_above_threshold(logits: jax.Array, enough) -> jax.Array:
  """Masks logits below the largest threshold for which `enough(kept)` holds.

  The bisection runs on the floats' bits, whose integer order is that of the
  floats, so it ends at the exact threshold.
  """
  bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
  order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
  shape = (*logits.shape[:-1], 1)
  low = jnp.full(shape, jnp.iinfo(jnp.int32).min)
  high = jnp.max(order, axis=-1, keepdims=True)

  def halve(_, bounds):
    low, high = bounds
    # The mean of two int32, rounded up, without overflow.
    middle = (low | high) - ((low ^ high) >> 1)
    ok = enough(order >= middle)
    return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

  low, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))
  return jnp.where(order >= low, logits, -jnp.inf)


def token_noise(
    key: jax.Array, image: jax.Array, slots_Q: jax.Array, vocab: int
) -> jax.Array:
  """Returns Gumbel noise keyed by (key, image, slot) alone, float32 [Q, V]."""
  key = jax.random.fold_in(key, image)
  noise = lambda slot: jax.random.gumbel(
      jax.random.fold_in(key, slot), (vocab,))
  return jax.vmap(noise)(slots_Q)


def sample(p_QV: jax.Array, gumbel_QV: jax.Array) -> jax.Array:
  """Samples from unnormalised probabilities by Gumbel-max, int32 [Q].

  Use it for shared noise: two samples with the same noise from similar
  probabilities are mostly equal. Otherwise `sample_inverse` is far cheaper.
  """
  score_QV = jnp.log(p_QV) + gumbel_QV
  # On a CPU, XLA's argmax takes three times as long.
  best_Q1 = jnp.max(score_QV, axis=-1, keepdims=True)
  last = p_QV.shape[-1] - 1
  place_QV = jnp.where(score_QV == best_Q1, jnp.arange(last + 1), last)
  return jnp.min(place_QV, axis=-1).astype(jnp.int32)


def sample_inverse(p_QV: jax.Array, key: jax.Array) -> jax.Array:
  """Samples from unnormalised probabilities by inversion, int32 [Q].

  One uniform number per row is looked up in the cumulative sums of blocks of
  tokens, then inside one block. Tokens of probability zero are never sampled.
  """
  vocab = p_QV.shape[-1]
  width = 1 << (vocab.bit_length() + 1) // 2
  p_QBW = jnp.pad(p_QV, ((0, 0), (0, -vocab % width))).reshape(
      len(p_QV), -(-vocab // width), width)  # p_QV may have no rows
  mass_QB = jnp.sum(p_QBW, axis=-1)
  u_Q = jax.random.uniform(key, mass_QB.shape[:1])
  block_Q, level_Q = _invert(mass_QB, u_Q * jnp.sum(mass_QB, axis=-1))
  p_QW = jnp.take_along_axis(p_QBW, block_Q[:, None, None], axis=1)[:, 0]
  return block_Q * width + _invert(p_QW, level_Q)[0]


def _invert(
    mass_QN: jax.Array, level_Q: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Finds the entry at which the cumulative sum exceeds a level.

  Only entries with mass are returned: the last of them if rounding leaves the
  level above all sums.

  Returns:
    The entry's index, int32 [Q], and the level minus the sum before the entry,
    float32 [Q].
  """
  count = mass_QN.shape[-1]
  sum_QN = jnp.cumsum(mass_QN, axis=-1)
  place_N = jnp.arange(count)
  rank_QN = jnp.where(
      sum_QN > level_Q[:, None], place_N, 2 * count - place_N)
  rank_Q = jnp.min(jnp.where(mass_QN > 0, rank_QN, 2 * count), axis=-1)
  place_Q = jnp.where(rank_Q < count, rank_Q, 2 * count - rank_Q)
  before_QN = sum_QN - mass_QN
  before_Q = jnp.take_along_axis(before_QN, place_Q[:, None], axis=-1)[:, 0]
  return place_Q, level_Q - before_Q


def residual(p_QV: jax.Array, q_QV: jax.Array) -> jax.Array:
  """Returns max(0, p - q), unnormalised; p itself where this is zero."""
  positive = jnp.maximum(p_QV - q_QV, 0.0)
  is_empty = jnp.sum(positive, axis=-1, keepdims=True) <= 0.0
  return jnp.where(is_empty, p_QV, positive)
