"""Binds a trunk to a grid: the pure functions that decoding calls."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.grid import Grid
from ssd_jax.core.types import KVCache, Model, Params, Prompt, Queries
from ssd_jax.models import layouts, quantization
from ssd_jax.models.transformer import Trunk, TrunkConfig
from ssd_jax.runtime import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
  """A trunk, its image and its positions.

  Attributes:
    cfg: Of the trunk.
    grid: The image as a sequence.
    rope: float32 [positions, H / 2, 2], the rotary table that a prompt's
      `positions` index.
    input_ids: int32 [V + forced kinds], row of the input table of each image
      code and forced token.
    dtype: Of activations and cache.
    taps: Layers whose outputs are appended to all hidden states, which are then
      [..., (1 + taps) * D]; what takes hidden states takes these too.
  """

  cfg: TrunkConfig
  grid: Grid
  rope: np.ndarray
  input_ids: np.ndarray
  dtype: jnp.dtype = jnp.float32
  taps: tuple[int, ...] = ()

  @functools.cached_property
  def trunk(self) -> Trunk:
    """The module whose parameters the functions take."""
    return Trunk(self.cfg, self.taps)

  def init(self, key: jax.Array) -> Params:
    """{"trunk": random float32 parameters}."""
    x = jnp.zeros((1, 1, self.cfg.d_model))
    cos_sin = jnp.zeros((1, 1, self.cfg.head_dim // 2, 2))
    visible = jnp.ones((1, 1, 1), bool)
    variables = self.trunk.init(key, x, cos_sin, visible, method="init_all")
    return {"trunk": variables["params"]}

  def model(self) -> Model:
    """What decoders see."""
    return Model(
        self.grid, self.cfg.vocab_out, self.prefill, self.forward,
        self.whole_logits, self.embed,
    )

  def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
    """float32 [..., V], image logits of pre-norm hidden states."""
    return self._apply(params, hidden, method="logits")

  def whole_logits(self, params: Params, hidden: jax.Array) -> jax.Array:
    """The same for drawing: all codes on every device of the mesh."""
    return sharding.replicate_axis(self.logits(params, hidden))

  def normalize(self, params: Params, hidden: jax.Array) -> jax.Array:
    """Hidden states after the final norm."""
    return self._apply(params, hidden, method="normalize")

  def project(self, params: Params, y: jax.Array) -> jax.Array:
    """float32 [..., V], image logits of normalised hidden states."""
    return self._apply(params, y, method="project")

  def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
    """[..., D], image tokens as the trunk is fed."""
    return self._rows(params, jnp.asarray(self.input_ids)[tokens])

  def prefill(
      self, params: Params, prompt: Prompt, scratch: int = 0
  ) -> tuple[jax.Array, KVCache]:
    """(hidden [S, D] of the last prompt slot, cache holding the prompt)."""
    rows, length = prompt.tokens.shape
    cfg = self.cfg
    slots = length + self.grid.length + scratch
    shape = (rows, cfg.n_kv_heads, slots, cfg.head_dim)
    is_stacked = "layers" in params["trunk"]
    zeros = jnp.zeros((cfg.n_layers if is_stacked else 1, *shape), self.dtype)
    cache = KVCache(zeros, zeros)
    if not is_stacked:
      cache = KVCache.from_layers([cache] * cfg.n_layers)
    visible = prompt_visible(prompt.mask)
    unused = jnp.zeros((rows, length, slots - length), bool)
    hidden, cache = self._apply(
        params,
        self._prompt_embeddings(params, prompt),
        self._turns(prompt.positions[:, :length]),
        jnp.concatenate([visible, unused], axis=-1),
        cache,
        jnp.broadcast_to(jnp.arange(length), (rows, length)),
    )
    return hidden[:, -1], cache

  def forward(
      self, params: Params, cache: KVCache, prompt: Prompt, queries: Queries
  ) -> tuple[jax.Array, KVCache]:
    """(hidden [S, Q, D] of the queries, cache with them written)."""
    length = prompt.tokens.shape[1]
    positions = jnp.take_along_axis(
        prompt.positions, length + queries.positions, axis=1
    )
    seen = jnp.broadcast_to(
        prompt.mask[:, None], queries.visible.shape[:2] + (length,)
    )
    return self._apply(
        params,
        self.embed(params, queries.tokens),
        self._turns(positions),
        jnp.concatenate([seen, queries.visible], axis=-1),
        cache,
        length + queries.slots,
    )

  def hidden(
      self, params: Params, prompt: Prompt, tokens_SN: jax.Array
  ) -> jax.Array:
    """[S, N, D]: the states that predict each slot, without a cache.

    The uncached forward of training: all of a sequence's tokens at once.
    """
    length = prompt.tokens.shape[1]
    x = jnp.concatenate([
        self._prompt_embeddings(params, prompt),
        self.embed(params, tokens_SN[:, :-1]),
    ], axis=1)
    total = x.shape[1]
    mask = jnp.pad(
        prompt.mask, ((0, 0), (0, total - length)), constant_values=True
    )
    hidden, _ = self._apply(
        params, x, self._turns(prompt.positions[:, :total]),
        prompt_visible(mask),
    )
    return hidden[:, length - 1:]

  def _prompt_embeddings(self, params: Params, prompt: Prompt) -> jax.Array:
    if prompt.features is not None:
      features = self._apply(
          params, prompt.features, prompt.tokens, method="embed_caption")
      return features.astype(self.dtype)
    return self._rows(params, prompt.tokens)

  def _rows(self, params: Params, ids: jax.Array) -> jax.Array:
    rows = self._apply(params, ids, method="embed")
    return sharding.replicate_axis(rows.astype(self.dtype))

  def _apply(self, params: Params, x: jax.Array, *args, **kwargs):
    rows = math.prod(x.shape[:-1]) / sharding.num_row_shards()
    is_few = rows <= layouts.TILED_ROWS
    is_tiled = is_few and "tiles" in params
    weights = params["tiles" if is_tiled else "trunk"]
    trunk = self.trunk.clone(
        unstacked="layers" not in weights, tile=layouts.TILE if is_tiled else 0)
    if quantization.is_quantized(weights):  # layers become floats one by one
      trunk = trunk.clone(packed=True)
      layers = {k: v for k, v in weights.items() if k.startswith("layers")}
      weights = quantization.dequantize(weights) | layers
    return trunk.apply({"params": weights}, x, *args, **kwargs)

  def _turns(self, positions: jax.Array) -> jax.Array:
    return jnp.asarray(self.rope)[positions]


def prompt_visible(mask_ST: jax.Array) -> jax.Array:
  """bool [S, T, T]: causal over existing slots; each slot sees itself."""
  length = mask_ST.shape[1]
  causal = jnp.tril(jnp.ones((length, length), bool))
  return (causal & mask_ST[:, None]) | jnp.eye(length, dtype=bool)
