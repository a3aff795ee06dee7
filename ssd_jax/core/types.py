"""The words that all rooms share: shape letters and the arrays of a pass.

Arrays in numeric code end in their shape letters:

  B images of a batch      G guidance streams (cond, uncond)   S = G * B rows
  N slots of the sequence  X = N + scratch slots of trees      P prompt slots
  Q queries of a pass      R rows and C columns of the grid    V image codes
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
  """Keys and values of every slot; a draft is overwritten, never erased.

  Of a trunk whose layers are apart, each layer has arrays of its own, [1, S, K,
  P + X, H]: what is done to all keys and values is done to each leaf.

  Attributes:
    k: [L, S, K, P + X, H], or one of each layer.
    v: As k.
  """

  k: jax.Array | tuple[jax.Array, ...]
  v: jax.Array | tuple[jax.Array, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """(L or 1, S, K, P + X, H)."""
    return jax.tree.leaves(self.k)[0].shape

  @classmethod
  def from_layers(cls, layers: Sequence["KVCache"]) -> "KVCache":
    """Layers that are apart."""
    k, v = ([getattr(x, name) for x in layers] for name in ("k", "v"))
    return cls(tuple(k), tuple(v))

  def layers(self) -> list["KVCache"]:
    """Each layer's, [1, S, K, P + X, H]."""
    if isinstance(self.k, tuple) and isinstance(self.v, tuple):
      return list(map(KVCache, self.k, self.v))
    each = range(self.shape[0])
    return [jax.tree.map(lambda x, i=i: x[i:i + 1], self) for i in each]


@flax.struct.dataclass
class Prompt:
  """What an image is drawn for, as the trunk sees it. S rows: all conditional
  ones first, then (with guidance) all unconditional ones.

  Attributes:
    tokens: int32 [S, P], ids of the trunk's input table.
    mask: bool [S, P], which of them exist.
    positions: int32 [S, P + N], row of the rotary table of every slot.
    features: [S, P, E], a text encoder's, used where `tokens` are 0 (other ids
      are rows of the unconditional caption), or None.
  """

  tokens: jax.Array
  mask: jax.Array
  positions: jax.Array
  features: jax.Array | None = None


class Queries(flax.struct.PyTreeNode):
  """The slots fed in a pass. One image's inside a decoder, a batch's outside.

  Attributes:
    tokens: int32 [Q], image codes, or V + k for the k-th forced token.
    positions: int32 [Q], slot of the sequence whose place the query takes.
    slots: int32 [Q], where key and value are written; X is nowhere (inactive).
    visible: bool [Q, X], which slots the query sees, itself included. The
      prompt is always seen.
  """

  tokens: jax.Array
  positions: jax.Array
  slots: jax.Array
  visible: jax.Array


@dataclasses.dataclass(frozen=True)
class Drafter:
  """An EAGLE-style drafter as decoding knows it: functions of one image's
  arrays, whose G streams are the rows.

  It is fed (hidden state that predicted slot i, token of slot i) and predicts
  the hidden state of slot i, whose logits are a draft of slot i + 1. It sees
  image slots only: the prompt reaches it through the hidden states.

  Attributes:
    cache: (streams, scratch) -> empty cache of N + scratch slots.
    forward: (params, cache, hidden [G, Q, D], queries [Q]) -> (hidden
      [G, Q, D], cache).
    width: D. The trunk's states are wider where the drafter reads the outputs
      of more layers; they come after the first D entries.
  """

  cache: Callable[[int, int], KVCache]
  forward: Callable[..., tuple[jax.Array, KVCache]]
  width: int


def _no_heads(*unused: object) -> jax.Array:
  raise UserError("Expected some, got a model without spatial heads. Train "
                  "them with train.mtp.")


@dataclasses.dataclass(frozen=True)
class Model:
  """A network as decoding knows it: pure functions of `params`, which is
  {"trunk": ...} and, where they are at hand, {"heads": ..., "drafter": ...}.

  The hidden state at a slot is the trunk's output before the final norm; its
  logits predict the token of the next slot. So the state that *predicted* slot
  i, which is what heads start from, is the hidden state of slot i - 1.

  Attributes:
    grid: The image as a sequence.
    vocab: Image codes V.
    prefill: (params, prompt, scratch) -> (hidden [S, D] of the last prompt
      slot, cache with `scratch` slots beyond the sequence).
    forward: (params, cache, prompt, queries [S, Q]) -> (hidden [S, Q, D],
      cache).
    logits: (params, hidden [..., D]) -> float32 [..., V].
    embed: (params, tokens [...]) -> [..., D], image tokens as the trunk is fed.
    draft: (params, direction, offset, hidden [..., D], tokens [...]) -> float32
      logits [..., V] of the cell `offset` to the right ("horizontal") or below
      ("vertical") of the cell that holds `tokens` and was predicted from
      `hidden`. Without spatial heads, a UserError that says so.
    heads: (horizontal, vertical) numbers of spatial heads.
    drafter: Of draft trees; None where none is at hand.
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
