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
  logits = guide(logits_GV, sampling.guidance)
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
  """int32 [Q]: draws from probabilities (need not sum to one) by Gumbel-max."""
  return jnp.argmax(jnp.log(p_QV) + gumbel_QV, axis=-1).astype(jnp.int32)


def residual(p_QV: jax.Array, q_QV: jax.Array) -> jax.Array:
  """max(0, p - q), not normalised; p itself where nothing is left."""
  positive = jnp.maximum(p_QV - q_QV, 0.0)
  is_empty = jnp.sum(positive, axis=-1, keepdims=True) <= 0.0
  return jnp.where(is_empty, p_QV, positive)
