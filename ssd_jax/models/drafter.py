"""The EAGLE-style drafter: one decoder layer that continues hidden states.

Fed the state that predicted a slot and the slot's token, it predicts the slot's
own hidden state, which the trunk's frozen head turns into a draft of the next
slot. Trunk and drafter share embedding, head, width and rotary scheme.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssd_jax.config import UserError
from ssd_jax.models.generator import Generator
from ssd_jax.models.transformer import Layer, TrunkConfig
from ssd_jax.types import Drafter, KVCache, Model, Params, Queries


class DrafterLayer(nn.Module):
  """Token and state -> fused projection -> one layer -> next state.

  Attributes:
    cfg: The trunk's, of which this is one more layer.
  """

  cfg: TrunkConfig

  @nn.compact
  def __call__(
      self, embedded_SQD, hidden_SQD, cos_sin_SQh2, visible_SQX,
      cache=None, slots_SQ=None,
  ):
    """Returns (hidden [S, Q, D] before the final norm, cache).

    Source: Li et al. 2024, EAGLE, arXiv:2401.15077, section 4.1; the layer has
    no norm before attention.
    """
    x = jnp.concatenate([embedded_SQD, hidden_SQD.astype(embedded_SQD.dtype)],
                        axis=-1)
    x = nn.Dense(self.cfg.d_model, dtype=x.dtype, name="fuse")(x)
    (x, cache), _ = Layer(self.cfg, input_norm=False, name="layer")(
        (x, cache), 0, cos_sin_SQh2, visible_SQX, slots_SQ
    )
    return x, cache


@dataclasses.dataclass(frozen=True, eq=False)
class DraftNet:
  """Binds a drafter to the trunk whose states it continues.

  Its places are those of the image slots, the last N rows of the trunk's rotary
  table: rotations are relative, so prompts of any length agree with them.

  Attributes:
    generator: Trunk, grid and places.
  """

  generator: Generator

  @functools.cached_property
  def layer(self) -> DrafterLayer:
    """The module whose parameters the functions take."""
    return DrafterLayer(self.generator.cfg)

  def init(self, key: jax.Array) -> Params:
    """Random float32 parameters; they belong in params["drafter"]."""
    cfg = self.generator.cfg
    x = jnp.zeros((1, 1, cfg.d_model))
    cos_sin = jnp.zeros((1, 1, cfg.head_dim // 2, 2))
    return self.layer.init(key, x, x, cos_sin, jnp.ones((1, 1, 1), bool))[
        "params"]

  def bind(self, model: Model) -> Model:
    """The model with this drafter at hand."""
    return dataclasses.replace(
        model, drafter=Drafter(self.cache, self.forward))

  def check(self, params: Params) -> None:
    """Raises UserError where params["drafter"] is another trunk's."""
    expected = jax.eval_shape(self.init, jax.random.key(0))
    shapes = lambda tree: {
        jax.tree_util.keystr(path): tuple(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    got, want = shapes(params["drafter"]), shapes(expected)
    wrong = sorted(k for k in got.keys() | want.keys()
                   if got.get(k) != want.get(k))
    if wrong:
      raise UserError(
          f"got a drafter with {wrong[0]} of shape {got.get(wrong[0])}, "
          f"expected {want.get(wrong[0])} as this trunk needs; train one for it"
      )

  def cache(self, streams: int, scratch: int) -> KVCache:
    """Empty keys and values [1, G, N + scratch, K, H] of one image."""
    cfg = self.generator.cfg
    shape = (1, streams, self.generator.grid.length + scratch, cfg.n_kv_heads,
             cfg.head_dim)
    zeros = jnp.zeros(shape, self.generator.dtype)
    return KVCache(zeros, zeros)

  def forward(
      self, params: Params, cache: KVCache, hidden_GQD: jax.Array,
      queries: Queries,
  ) -> tuple[jax.Array, KVCache]:
    """(hidden [G, Q, D] of the queries' slots, cache with them written).

    Args:
      params: Of the model.
      cache: From `cache`.
      hidden_GQD: The state that predicted each query's token.
      queries: One image's; `slots` are of the drafter's cache.
    """
    streams = hidden_GQD.shape[0]
    repeat = lambda x: jnp.broadcast_to(x, (streams, *x.shape))
    return self.layer.apply(
        {"params": params["drafter"]},
        repeat(self.generator.embed(params, queries.tokens)),
        hidden_GQD,
        repeat(self.places[queries.positions]),
        repeat(queries.visible), cache, repeat(queries.slots),
    )

  def predict(
      self, params: Params, hidden_SND: jax.Array, tokens_SN: jax.Array
  ) -> jax.Array:
    """[S, N, D]: the hidden state of every slot, without a cache.

    Args:
      params: Of the model.
      hidden_SND: The states that predict each slot (`Generator.hidden`).
      tokens_SN: int32, the tokens of the slots.
    """
    rows, length = tokens_SN.shape
    causal = jnp.tril(jnp.ones((length, length), bool))
    repeat = lambda x: jnp.broadcast_to(x, (rows, *x.shape))
    hidden, _ = self.layer.apply(
        {"params": params["drafter"]}, self.generator.embed(params, tokens_SN),
        hidden_SND, repeat(self.places), repeat(causal),
    )
    return hidden

  @property
  def places(self) -> jax.Array:
    """float32 [N, H / 2, 2]: rotary rows of the image slots."""
    return jnp.asarray(self.generator.rope[-self.generator.grid.length:])
