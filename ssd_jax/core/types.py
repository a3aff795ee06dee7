"""Types shared by the whole package, and the shape letters of array names.

Names of arrays end in their shape letters:

  B images of a batch      G guidance streams (cond, uncond)   S = G * B rows
  N slots of the sequence  X = N + scratch slots of trees      P prompt slots
  Q queries of a pass      R rows and C columns of the grid    V image tokens
  L layers   D width   F hidden width   H head dimension   K key/value heads
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import flax.struct
import jax

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid

Params = Any


@flax.struct.dataclass
class KVCache:
  """Keys and values of every slot; those of drafts are overwritten, not erased.

  With unstacked layers, each layer has its own arrays [1, S, K, P + X, H], so
  functions of the cache should map over its leaves.

  Attributes:
    k: Keys [L, S, K, P + X, H], or a tuple with one array per layer.
    v: Values, as `k`.
  """

  k: jax.Array | tuple[jax.Array, ...]
  v: jax.Array | tuple[jax.Array, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the first leaf: (L or 1, S, K, P + X, H)."""
    return jax.tree.leaves(self.k)[0].shape

  @classmethod
  def from_layers(cls, layers: Sequence["KVCache"]) -> "KVCache":
    """Returns the cache of unstacked layers."""
    k, v = ([getattr(x, name) for x in layers] for name in ("k", "v"))
    return cls(tuple(k), tuple(v))

  def layers(self) -> list["KVCache"]:
    """Returns the cache of each layer, [1, S, K, P + X, H]."""
    if isinstance(self.k, tuple) and isinstance(self.v, tuple):
      return list(map(KVCache, self.k, self.v))
    each = range(self.shape[0])
    return [jax.tree.map(lambda x, i=i: x[i:i + 1], self) for i in each]


@flax.struct.dataclass
class Prompt:
  """Encoded prompts.

  The S rows are all conditional ones, followed (with guidance) by all
  unconditional ones.

  Attributes:
    tokens: int32 [S, P], ids of the trunk's input table.
    mask: bool [S, P], which of them exist.
    positions: int32 [S, P + N], row of the rotary table for every slot.
    features: [S, P, E], features of a text encoder, used where `tokens` is 0
      (other ids are rows of the unconditional caption), or None.
    given: int32 [S, P], image tokens, or V + k for the k-th forced token, that
      are fed in place of `tokens`; -1 where there is none. Or None.
    draft: int32 [S, P + N], first draft of every slot, -1 where there is none;
      the first P entries are not read. Or None.
  """

  tokens: jax.Array
  mask: jax.Array
  positions: jax.Array
  features: jax.Array | None = None
  given: jax.Array | None = None
  draft: jax.Array | None = None


class Queries(flax.struct.PyTreeNode):
  """The slots fed in a pass; of one image inside a decoder, of a batch outside.

  Attributes:
    tokens: int32 [Q], image tokens, or V + k for the k-th forced token.
    positions: int32 [Q], slot of the sequence that each query stands for.
    slots: int32 [Q], slot that key and value are written to; X makes the query
      inactive.
    visible: bool [Q, X], slots that each query sees, itself included. The
      prompt is always visible.
  """

  tokens: jax.Array
  positions: jax.Array
  slots: jax.Array
  visible: jax.Array


@dataclasses.dataclass(frozen=True)
class Drafter:
  """An EAGLE-style drafter as used by decoders.

  Its functions take the arrays of one image, with G streams as rows. From the
  hidden state that predicted slot i and the token of slot i it predicts the
  hidden state of slot i, whose logits draft slot i + 1. It sees only image
  slots: the prompt reaches it through the hidden states.

  Attributes:
    cache: (streams, scratch) -> empty cache of N + scratch slots.
    forward: (params, cache, hidden [G, Q, D], queries [Q]) -> (hidden
      [G, Q, D], cache).
    width: Width D. If the drafter reads the outputs of more layers, the trunk's
      hidden states contain them after the first D entries.
    preview: The drafter of the grid that the model generates first, or None.
  """

  cache: Callable[[int, int], KVCache]
  forward: Callable[..., tuple[jax.Array, KVCache]]
  width: int
  preview: "Drafter | None" = None


def _no_heads(*unused: object) -> jax.Array:
  raise UserError("Expected a model with spatial heads, got a model without "
                  "spatial heads. Train them with train.mtp.")


@dataclasses.dataclass(frozen=True)
class Model:
  """A network as used by decoders: pure functions of `params`.

  `params` is {"trunk": ...} with optional entries {"heads": ...,
  "drafter": ...}.

  The hidden state at a slot is the trunk's output before the final norm; its
  logits predict the token of the next slot. So the state that *predicted* slot
  i, the input of heads, is the hidden state of slot i - 1.

  Attributes:
    grid: The image as a sequence.
    vocab: Number of image tokens V.
    prefill: (params, prompt, scratch) -> (hidden [S, D] of the last prompt
      slot, cache with `scratch` slots beyond the sequence).
    forward: (params, cache, prompt, queries [S, Q]) -> (hidden [S, Q, D],
      cache).
    logits: (params, hidden [..., D]) -> float32 [..., V].
    embed: (params, tokens [...]) -> [..., D], image tokens as inputs of the
      trunk.
    draft: (params, direction, offset, hidden [..., D], tokens [...]) -> float32
      logits [..., V] of the tokens `offset` positions to the right
      ("horizontal") or below ("vertical") of `tokens`, which were predicted
      from `hidden`. Without spatial heads it raises a UserError.
    heads: Numbers of spatial heads (horizontal, vertical).
    drafter: The drafter of draft trees, or None.
    preview: Grid that is generated first and belongs to the prompt of `grid`,
      or None.
  """

  grid: Grid
  vocab: int
  prefill: Callable[..., tuple[jax.Array, KVCache]]
  forward: Callable[..., tuple[jax.Array, KVCache]]
  logits: Callable[[Params, jax.Array], jax.Array]
  embed: Callable[[Params, jax.Array], jax.Array]
  draft: Callable[..., jax.Array] = _no_heads
  heads: tuple[int, int] = (0, 0)
  drafter: Drafter | None = None
  preview: Grid | None = None
