"""Logits -> the distribution that is sampled, and the noise to sample it.

Order, for every family: guidance, temperature, top-k (ties are kept), top-p,
softmax. Thresholds are found by bisection, not by sorting.

Token noise is keyed by (seed, image, slot) alone: whoever asks for the noise of
a slot gets the same, so that decoders can be compared cell by cell. Noise of
acceptance tests and residual draws is keyed by the pass as well; reusing it
would bias the law.
"""

from typing import TypedDict

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.runtime import sharding

BISECTIONS = 32  # of a float32's exponent and mantissa


class Overrides(TypedDict, total=False):
  """What a call sets of the target distribution; None is the model's own."""

  guidance: float | None
  temperature: float | None
  top_k: int | None
  top_p: float | None


@flax.struct.dataclass
class Sampling:
  """Settings of the target distribution; changing a number recompiles nothing.

  Attributes:
    guidance: Scale s of u + s (c - u); unused with a single stream.
    temperature: Divides the logits.
    top_k: Number of largest logits kept.
    top_p: Least probability mass kept.
    use_top_k: Whether top_k is applied at all (static).
    use_top_p: Whether top_p is applied at all (static).
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
    """Settings from numbers; top_k 0 and top_p 1 mean no filter."""
    return cls(
        jnp.float32(guidance), jnp.float32(temperature), jnp.int32(top_k),
        jnp.float32(top_p), top_k > 0, top_p < 1.0,
    )


def guide(logits_GV: jax.Array, guidance: jax.Array) -> jax.Array:
  """Guided logits of stacked streams [G, ..., V] -> [..., V], float32."""
  logits_GV = logits_GV.astype(jnp.float32)
  if logits_GV.shape[0] == 1:
    return logits_GV[0]
  cond, uncond = logits_GV
  return uncond + guidance * (cond - uncond)


def target(logits_GV: jax.Array, sampling: Sampling) -> jax.Array:
  """float32 [..., V]: the distribution to sample, of stacked streams.

  Args:
    logits_GV: [G, ..., V], conditional first, then unconditional if G is 2.
    sampling: Guidance, temperature and filters.
  """
  logits = guide(sharding.replicate_axis(logits_GV, axis=0), sampling.guidance)
  logits /= jnp.maximum(sampling.temperature, 1e-5)
  if sampling.use_top_k:
    logits = keep_top_k(logits, sampling.top_k)
  if sampling.use_top_p:
    logits = keep_top_p(logits, sampling.top_p)
  return jax.nn.softmax(logits, axis=-1)


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
  """Logits below the k-th largest become -inf; ties with it are kept."""
  enough = lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= k
  return _keep_above_threshold(logits, enough)


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
  """Keeps the smallest set of largest logits whose mass is at least p."""
  probs = jax.nn.softmax(logits, axis=-1)
  enough = lambda kept: (
      jnp.sum(jnp.where(kept, probs, 0.0), axis=-1, keepdims=True) >= p
  )
  return _keep_above_threshold(logits, enough)


def _keep_above_threshold(logits: jax.Array, enough) -> jax.Array:
  """Masks below the largest threshold at which `enough(kept)` still holds.

  Floats are compared by their bits, whose integer order is theirs, so that the
  bisection ends exactly.
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
  """float32 [Q, V]: Gumbel noise keyed by (key, image, slot) alone."""
  key = jax.random.fold_in(key, image)
  draw = lambda slot: jax.random.gumbel(jax.random.fold_in(key, slot), (vocab,))
  return jax.vmap(draw)(slots_Q)


def sample(p_QV: jax.Array, gumbel_QV: jax.Array) -> jax.Array:
  """int32 [Q]: draws from probabilities (need not sum to one) by Gumbel-max.

  For noise that is shared: two draws with the same noise from similar
  probabilities are mostly the same. Else `draw` is far cheaper.
  """
  score_QV = jnp.log(p_QV) + gumbel_QV
  # XLA's argmax on a CPU takes three times as long as this.
  best_Q1 = jnp.max(score_QV, axis=-1, keepdims=True)
  last = p_QV.shape[-1] - 1
  place_QV = jnp.where(score_QV == best_Q1, jnp.arange(last + 1), last)
  return jnp.min(place_QV, axis=-1).astype(jnp.int32)


def sample_inverse(p_QV: jax.Array, key: jax.Array) -> jax.Array:
  """int32 [Q]: draws from probabilities (need not sum to one) by inversion.

  One uniform number a row, looked up among the sums of runs of codes and then
  in one run; a code without probability is never drawn.
  """
  vocab = p_QV.shape[-1]
  run = 1 << (vocab.bit_length() + 1) // 2
  p_QRW = jnp.pad(p_QV, ((0, 0), (0, -vocab % run))).reshape(
      len(p_QV), -(-vocab // run), run)  # there may be no rows
  mass_QR = jnp.sum(p_QRW, axis=-1)
  u_Q = jax.random.uniform(key, mass_QR.shape[:1])
  run_Q, left_Q = _invert(mass_QR, u_Q * jnp.sum(mass_QR, axis=-1))
  p_QW = jnp.take_along_axis(p_QRW, run_Q[:, None, None], axis=1)[:, 0]
  return run_Q * run + _invert(p_QW, left_Q)[0]


def _invert(
    mass_QN: jax.Array, level_Q: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(the entry in which running sums pass a level, what the level is there).

  Only an entry with mass; the last one where rounding leaves the level above
  all sums.
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
  """max(0, p - q), not normalised; p itself where nothing is left."""
  positive = jnp.maximum(p_QV - q_QV, 0.0)
  is_empty = jnp.sum(positive, axis=-1, keepdims=True) <= 0.0
  return jnp.where(is_empty, p_QV, positive)
