"""Binds a trunk to a grid and provides the pure functions of decoding."""

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

_CHUNK = 1024  # prompt slots that are read at once


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
  """A trunk with its grid and its positions.

  Attributes:
    cfg: Sizes and options of the trunk.
    grid: The image as a sequence.
    rope: float32 [positions, H / 2, 2], the rotary table that a prompt's
      `positions` index.
    input_ids: int32 [V + forced kinds], row of the input table of each image
      token and forced token.
    dtype: Type of activations and cache.
    preview: Grid that is generated first and belongs to the prompt of `grid`,
      or None.
    taps: Layers whose outputs are appended to all hidden states, which are then
      [..., (1 + taps) * D]; functions of hidden states accept these too.
  """

  cfg: TrunkConfig
  grid: Grid
  rope: np.ndarray
  input_ids: np.ndarray
  dtype: jnp.dtype = jnp.float32
  preview: Grid | None = None
  taps: tuple[int, ...] = ()

  @functools.cached_property
  def trunk(self) -> Trunk:
    """The module whose parameters the functions take."""
    return Trunk(self.cfg, self.taps)

  def init(self, key: jax.Array) -> Params:
    """Returns {"trunk": random float32 parameters}."""
    x = jnp.zeros((1, 1, self.cfg.d_model))
    cos_sin = jnp.zeros((1, 1, self.cfg.head_dim // 2, 2))
    visible = jnp.ones((1, 1, 1), bool)
    variables = self.trunk.init(key, x, cos_sin, visible, method="init_all")
    return {"trunk": variables["params"]}

  def model(self) -> Model:
    """Returns the functions that decoders use."""
    return Model(
        self.grid, self.cfg.vocab_out, self.prefill, self.forward,
        self.replicated_logits, self.embed, preview=self.preview,
    )

  def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
    """Returns image logits of pre-norm hidden states, float32 [..., V]."""
    return self._apply(params, hidden, method="logits")

  def replicated_logits(self, params: Params, hidden: jax.Array) -> jax.Array:
    """Returns `logits` with the vocabulary whole on each device, to sample."""
    return sharding.replicate_axis(self.logits(params, hidden))

  def normalize(self, params: Params, hidden: jax.Array) -> jax.Array:
    """Returns hidden states after the final norm, [..., D]."""
    return self._apply(params, hidden, method="normalize")

  def project(self, params: Params, y: jax.Array) -> jax.Array:
    """Returns image logits of normalised hidden states, float32 [..., V]."""
    return self._apply(params, y, method="project")

  def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
    """Embeds image tokens as inputs of the trunk, [..., D]."""
    return self._rows(params, jnp.asarray(self.input_ids)[tokens])

  def prefill(
      self, params: Params, prompt: Prompt, scratch: int = 0
  ) -> tuple[jax.Array, KVCache]:
    """Runs the prompts.

    Long ones, of images, are read in chunks: the memory of attention then grows
    with their length, not with its square.

    Args:
      params: Parameters of the model.
      prompt: Prompts of S rows.
      scratch: Cache slots beyond the sequence.

    Returns:
      The hidden state of the last prompt slot [S, D], and the cache holding the
      prompt.
    """
    rows, length = prompt.tokens.shape
    cfg = self.cfg
    slots = length + self.grid.length + scratch
    shape = (rows, cfg.n_kv_heads, slots, cfg.head_dim)
    is_stacked = "layers" in params["trunk"]
    zeros = jnp.zeros((cfg.n_layers if is_stacked else 1, *shape), self.dtype)
    cache = KVCache(zeros, zeros)
    if not is_stacked:
      cache = KVCache.from_layers([cache] * cfg.n_layers)
    rest = length % _CHUNK or _CHUNK  # slots of the first chunk
    hidden, cache = self._read_chunk(
        params, prompt, cache, 0, min(rest, length))
    if length <= _CHUNK:
      return hidden, cache

    def read(carry, start):
      return self._read_chunk(params, prompt, carry[1], start, _CHUNK), None

    starts = jnp.arange(rest, length, _CHUNK)
    return jax.lax.scan(read, (hidden, cache), starts)[0]

  def _read_chunk(
      self, params: Params, prompt: Prompt, cache: KVCache,
      start: int | jax.Array, count: int,
  ) -> tuple[jax.Array, KVCache]:
    """Runs some slots of the prompts, after those before them.

    Args:
      params: Parameters of the model.
      prompt: Prompts of S rows.
      cache: Keys and values of every slot.
      start: The first slot.
      count: Number of slots.

    Returns:
      The hidden state of the last of them [S, D], and the updated cache.
    """
    rows, length = prompt.tokens.shape
    part = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, start, count, axis=1), prompt)
    slots = start + jnp.arange(count)
    visible = prompt_visible(prompt.mask, slots)
    unused = jnp.zeros((rows, count, cache.shape[3] - length), bool)
    hidden, cache = self._apply(
        params,
        self._prompt_embeddings(params, part),
        self._cos_sin(part.positions),
        jnp.concatenate([visible, unused], axis=-1),
        cache,
        jnp.broadcast_to(slots, (rows, count)),
    )
    return hidden[:, -1], cache

  def forward(
      self, params: Params, cache: KVCache, prompt: Prompt, queries: Queries
  ) -> tuple[jax.Array, KVCache]:
    """Runs a pass over queries.

    Args:
      params: Parameters of the model.
      cache: Keys and values of every slot.
      prompt: Prompts of S rows.
      queries: Queries of S rows.

    Returns:
      The hidden states of the queries [S, Q, D], and the updated cache.
    """
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
        self._cos_sin(positions),
        jnp.concatenate([seen, queries.visible], axis=-1),
        cache,
        length + queries.slots,
    )

  def hidden(
      self, params: Params, prompt: Prompt, tokens_SN: jax.Array
  ) -> jax.Array:
    """Returns the hidden states that predict each slot, [S, N, D].

    This is the uncached forward pass of training, over all tokens at once.

    Args:
      params: Parameters of the model.
      prompt: Prompts of S rows.
      tokens_SN: Tokens of all slots.
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
        params, x, self._cos_sin(prompt.positions[:, :total]),
        prompt_visible(mask),
    )
    return hidden[:, length - 1:]

  def _prompt_embeddings(self, params: Params, prompt: Prompt) -> jax.Array:
    x = self._text_embeddings(params, prompt)
    if prompt.given is None:
      return x
    given = self.embed(params, jnp.maximum(prompt.given, 0))
    return jnp.where(prompt.given[..., None] >= 0, given, x)

  def _text_embeddings(self, params: Params, prompt: Prompt) -> jax.Array:
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
    if quantization.is_quantized(weights):  # dequantized layer by layer
      trunk = trunk.clone(packed=True)
      layers = {k: v for k, v in weights.items() if k.startswith("layers")}
      weights = {**quantization.dequantize(weights), **layers}
    return trunk.apply({"params": weights}, x, *args, **kwargs)

  def _cos_sin(self, positions: jax.Array) -> jax.Array:
    return jnp.asarray(self.rope)[positions]


def prompt_visible(
    mask_ST: jax.Array, slots_Q: jax.Array | None = None
) -> jax.Array:
  """Returns the causal mask of prompts, bool [S, Q, T].

  Each slot sees the existing slots before it, and itself.

  Args:
    mask_ST: bool, which slots exist.
    slots_Q: The slots that see; None for all.
  """
  every_T = jnp.arange(mask_ST.shape[1])
  slots_Q = every_T if slots_Q is None else slots_Q
  causal = every_T <= slots_Q[:, None]
  return (causal & mask_ST[:, None]) | (every_T == slots_Q[:, None])
