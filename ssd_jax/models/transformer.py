"""The decoder-only trunk of every family: one module, driven by its config.

Pre-norm RMSNorm, gated MLP, rotary positions given per slot. Layers are stacked
along axis 0 of their parameters and run by `nn.scan`; the cache is part of the
carry, so that it is not copied. Alternatively the layers are unstacked and run
one after another, see models/layouts.py.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssd_jax.core.config import check, check_sizes
from ssd_jax.core.types import KVCache
from ssd_jax.models import attention, quantization
from ssd_jax.models.norms import HeadNorm, RMSNorm
from ssd_jax.models.rope import rotate
from ssd_jax.runtime import sharding

_WIDEST_HEAD = 4096
GATES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
  """Sizes and options of a trunk.

  Attributes:
    d_model: Width D.
    n_layers: Layers L.
    n_heads: Query heads.
    n_kv_heads: Key/value heads K.
    head_dim: Head dimension H.
    d_ff: Hidden width F of the gated MLP.
    vocab_in: Rows of the input table.
    vocab_out: Number of image tokens V, the outputs of the head.
    norm_eps: Epsilon of RMSNorm.
    norm_offset: Whether the scales of RMSNorm are stored as differences from 1
      (Gemma).
    qk_norm: LayerNorm with scale and bias on each head of q and k, before the
      rotation (Chameleon).
    qk_rms: RMSNorm on each head of q and k, before the rotation, with one scale
      for all heads of a layer (Qwen3).
    qkv_bias: Whether q, k and v have biases (Qwen2).
    post_norms: Whether the outputs of attention and MLP are normalised before
      they are added (GLM-4).
    gate: Activation of the MLP's gate, "silu" or "gelu_tanh" (Gemma).
    interleaved: Whether rotary pairs are adjacent entries (LlamaGen) instead
      of entries of the two halves.
    head_hidden: Width of the head's hidden layer, which has biases and an
      exact GELU (Janus); 0 for a linear head without bias.
    caption_dim: Width of a text encoder's features, which two linear layers
      with a GELU between them project to D (LlamaGen); 0 if prompts are tokens.
    caption_slots: Rows of the unconditional caption's features.
    remat: Whether to recompute each layer in the backward pass.
  """

  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  d_ff: int
  vocab_in: int
  vocab_out: int
  norm_eps: float = 1e-5
  norm_offset: bool = False
  qk_norm: bool = False
  qk_rms: bool = False
  qkv_bias: bool = False
  post_norms: bool = False
  gate: str = "silu"
  interleaved: bool = False
  head_hidden: int = 0
  caption_dim: int = 0
  caption_slots: int = 0
  remat: bool = False

  def __post_init__(self):
    check_sizes(self, "head_hidden", "caption_dim", "caption_slots")
    check(self.n_heads % self.n_kv_heads == 0, "n_heads", self.n_heads,
          f"a multiple of n_kv_heads={self.n_kv_heads}")
    check(self.head_dim % 2 == 0 and self.head_dim <= _WIDEST_HEAD, "head_dim",
          self.head_dim, f"even, at most {_WIDEST_HEAD}")
    check(self.gate in GATES, "gate", self.gate, f"one of {', '.join(GATES)}")
    check(not (self.qk_norm and self.qk_rms), "qk_rms", self.qk_rms,
          "False with qk_norm=True")


_dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """Returns x @ w [..., N], of a matrix [K, N] or of its tiles [N / T, K, T].

  A tile is a contiguous copy of T columns, see models/layouts.py.
  """
  w = w.astype(x.dtype)
  if w.ndim == 2:
    return x @ w
  x_MK = x.reshape(-1, x.shape[-1])
  y_TMN = jax.lax.dot_general(
      jnp.broadcast_to(x_MK, (len(w), *x_MK.shape)), w,
      (((2,), (1,)), ((0,), (0,))))
  return jnp.swapaxes(y_TMN, 0, 1).reshape(*x.shape[:-1], -1)


def matrix_shape(
    inputs: tuple[int, ...], outputs: tuple[int, ...], tile: int
) -> tuple[int, ...]:
  """Returns the shape of a matrix, or of its tiles if `tile` is positive.

  Args:
    inputs: Contracted dimensions.
    outputs: Output dimensions.
    tile: Columns per tile; 0 for an untiled matrix.
  """
  if not tile:
    return (*inputs, *outputs)
  return math.prod(outputs) // tile, math.prod(inputs), tile


class Attention(nn.Module):
  """Grouped-query attention over the cache, or over the queries themselves.

  Attributes:
    cfg: Sizes and options of the trunk.
    tile: Columns per tile of the matrices; 0 if they are not tiled.
  """

  cfg: TrunkConfig
  tile: int = 0

  @nn.compact
  def __call__(self, x_SQD, cos_sin_SQh2, visible_SQX, cache, layer, slots_SQ):
    """Returns (output [S, Q, D], cache)."""
    cfg = self.cfg
    into = nn.initializers.variance_scaling(
        1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))

    def heads(name, count):
      shape = (count, cfg.head_dim)
      w = self.param(name, into, matrix_shape((cfg.d_model,), shape, self.tile))
      if self.tile:
        y = matmul(x_SQD, w).reshape(*x_SQD.shape[:2], *shape)
      else:
        y = jnp.einsum("sqd,dnh->sqnh", x_SQD, w.astype(x_SQD.dtype))
      if not cfg.qkv_bias:
        return y
      bias = self.param(f"{name}_bias", nn.initializers.zeros, shape)
      return y + bias.astype(y.dtype)

    q, k, v = (heads("q", cfg.n_heads), heads("k", cfg.n_kv_heads),
               heads("v", cfg.n_kv_heads))
    if cfg.qk_norm:
      q, k = HeadNorm(name="q_norm")(q), HeadNorm(name="k_norm")(k)
    if cfg.qk_rms:
      q, k = (RMSNorm(cfg.norm_eps, name=f"{name}_rms")(x)
              for name, x in (("q", q), ("k", k)))
    q = rotate(q, cos_sin_SQh2, cfg.interleaved)
    k = rotate(k, cos_sin_SQh2, cfg.interleaved)
    if cache is not None:
      cache = KVCache(attention.update_cache(cache.k, layer, slots_SQ, k),
                      attention.update_cache(cache.v, layer, slots_SQ, v))
      k, v = cache.k[layer].astype(q.dtype), cache.v[layer].astype(q.dtype)
    else:
      k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    y = attention.attend(q, k, v, visible_SQX)
    o = self.param(
        "o", nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2),
        matrix_shape((cfg.n_heads, cfg.head_dim), (cfg.d_model,), self.tile),
    )
    # Flattened to one matmul, as XLA would otherwise transpose the weights.
    o = o if self.tile else o.reshape(-1, cfg.d_model)
    return matmul(y.reshape(*y.shape[:2], -1), o), cache


class GatedMLP(nn.Module):
  """down(activation(gate(x)) * up(x)), bias-free.

  Attributes:
    features: Hidden width.
    activation: A key of GATES.
    tile: As in `Attention`.
  """

  features: int
  activation: str = "silu"
  tile: int = 0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the input's shape."""
    outer, inner = (x.shape[-1],), (self.features,)
    gate = self.param("gate", _dense, matrix_shape(outer, inner, self.tile))
    up = self.param("up", _dense, matrix_shape(outer, inner, self.tile))
    down = self.param("down", _dense, matrix_shape(inner, outer, self.tile))
    gated = GATES[self.activation](matmul(x, gate)) * matmul(x, up)
    return matmul(gated, down)


class Layer(nn.Module):
  """One pre-norm block; the body of the scan.

  Attributes:
    cfg: Sizes and options of the trunk.
    input_norm: Whether the input of attention is normalised.
    emit: Whether the output is also an output of the scan.
    tile: As in `Attention`.
  """

  cfg: TrunkConfig
  input_norm: bool = True
  emit: bool = False
  tile: int = 0

  @nn.compact
  def __call__(self, carry, layer, cos_sin, visible, slots):
    """Returns ((x, cache), x or None)."""
    x, cache = carry
    cfg = self.cfg
    norm = functools.partial(RMSNorm, cfg.norm_eps, cfg.norm_offset)
    y = norm(name="attn_norm")(x) if self.input_norm else x
    y, cache = Attention(cfg, self.tile, name="attn")(
        y, cos_sin, visible, cache, layer, slots)
    y = norm(name="attn_post_norm")(y) if cfg.post_norms else y
    x = sharding.replicate_axis(x + y)
    y = norm(name="mlp_norm")(x)
    y = GatedMLP(cfg.d_ff, cfg.gate, self.tile, name="mlp")(y)
    y = norm(name="mlp_post_norm")(y) if cfg.post_norms else y
    x = sharding.replicate_axis(x + y)
    return (x, cache), x if self.emit else None


class Trunk(nn.Module):
  """Tokens -> hidden states before the final norm -> image logits.

  Attributes:
    cfg: Sizes and options.
    taps: Layers whose outputs are appended to the hidden states.
    packed: Whether the layers' matrices are in int8.
    unstacked: Whether each layer has its own parameters instead of a slice of
      stacked ones.
    tile: As in `Attention`; only with unstacked layers.
  """

  cfg: TrunkConfig
  taps: tuple[int, ...] = ()
  packed: bool = False
  unstacked: bool = False
  tile: int = 0

  def setup(self):  # noqa: D102
    cfg = self.cfg
    self.embedding = self.param(
        "embedding", nn.initializers.normal(0.02), (cfg.vocab_in, cfg.d_model)
    )
    block = nn.remat(Layer, prevent_cse=False) if cfg.remat else Layer
    block = quantization.dequantized(block) if self.packed else block
    if self.unstacked:
      self.layers = [
          block(cfg, emit=bool(self.taps), tile=self.tile)
          for _ in range(cfg.n_layers)]
    else:
      self.layers = nn.scan(
          block,
          variable_axes={"params": 0},
          split_rngs={"params": True},
          in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
          length=cfg.n_layers,
          metadata_params={nn.PARTITION_NAME: "layers"},
      )(cfg, emit=bool(self.taps))
    self.final_norm = RMSNorm(cfg.norm_eps, cfg.norm_offset)
    width = cfg.head_hidden or cfg.d_model
    self.head = self.param(
        "head", _dense, matrix_shape((width,), (cfg.vocab_out,), self.tile))
    if cfg.head_hidden:
      zeros = nn.initializers.zeros
      self.head_in = self.param("head_in", _dense, (cfg.d_model, width))
      self.head_in_bias = self.param("head_in_bias", zeros, (width,))
      self.head_bias = self.param("head_bias", zeros, (cfg.vocab_out,))
    if cfg.caption_dim:
      self.caption_in = self.param(
          "caption_in", _dense, (cfg.caption_dim, cfg.d_model))
      self.caption_out = self.param(
          "caption_out", _dense, (cfg.d_model, cfg.d_model))
      self.caption_null = self.param(
          "caption_null", nn.initializers.normal(cfg.caption_dim**-0.5),
          (cfg.caption_slots, cfg.caption_dim))

  def __call__(
      self, x_SQD: jax.Array, cos_sin_SQh2: jax.Array, visible_SQX: jax.Array,
      cache: KVCache | None = None, slots_SQ: jax.Array | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Runs all layers.

    Args:
      x_SQD: Embedded tokens.
      cos_sin_SQh2: Rows of the rotary table.
      visible_SQX: Slots that each query sees; without a cache, queries.
      cache: Keys and values of every slot, or None.
      slots_SQ: Slots that the queries' keys and values are written to; slots
        out of range are dropped.

    Returns:
      Hidden states before the final norm, with taps [S, Q, (1 + taps) * D],
      and the updated cache.
    """
    carry = (sharding.replicate_axis(x_SQD), cache)
    rest = (cos_sin_SQh2, visible_SQX, slots_SQ)
    if self.unstacked:
      carry, every_LSQD = self._one_by_one(*carry, *rest)
    else:
      carry, every_LSQD = self.layers(
          carry, jnp.arange(self.cfg.n_layers), *rest)
    x_SQD, cache = carry
    x_SQD = sharding.replicate_axis(
      x_SQD
    )  # else what follows would cut the loop's
    if self.taps:
      tapped = [every_LSQD[layer] for layer in self.taps]
      x_SQD = jnp.concatenate([x_SQD, *tapped], axis=-1)
    return x_SQD, cache

  def _one_by_one(self, x_SQD, cache, *rest):
    """Runs unstacked layers; returns (x, cache) and each layer's output."""
    caches = cache.layers() if cache else [None] * len(self.layers)
    every_LSQD = []
    for index, layer in enumerate(self.layers):
      (x_SQD, caches[index]), emitted = layer(
          (x_SQD, caches[index]), 0, *rest)
      every_LSQD.append(emitted)
    return (x_SQD, cache and KVCache.from_layers(caches)), every_LSQD

  def init_all(self, x_SQD, cos_sin_SQh2, visible_SQX):
    """Uses every parameter; for `init`."""
    if self.cfg.caption_dim:
      self.embed_caption(jnp.zeros((1, 1, self.cfg.caption_dim)), jnp.ones(
          (1, 1), jnp.int32))
    return self.logits(self(x_SQD, cos_sin_SQh2, visible_SQX)[0])

  def embed(self, ids: jax.Array) -> jax.Array:
    """Returns rows of the input table, [..., D]."""
    return self.embedding[ids]

  def embed_caption(
      self, features_SPE: jax.Array, ids_SP: jax.Array
  ) -> jax.Array:
    """Embeds captions, [S, P, D].

    Args:
      features_SPE: A text encoder's features, used where the id is 0.
      ids_SP: 0, or 1 + a row of the unconditional caption.
    """
    null = self.caption_null[jnp.maximum(ids_SP - 1, 0)]
    x = jnp.where(ids_SP[..., None] > 0, null, features_SPE)
    x = nn.gelu(x @ self.caption_in.astype(x.dtype), approximate=True)
    return x @ self.caption_out.astype(x.dtype)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Returns image logits of pre-norm hidden states, float32 [..., V]."""
    return self.project(self.normalize(hidden))

  def normalize(self, hidden: jax.Array) -> jax.Array:
    """Returns hidden states after the final norm, without taps, [..., D]."""
    return self.final_norm(hidden[..., :self.cfg.d_model])

  def project(self, y: jax.Array) -> jax.Array:
    """Returns image logits of normalised hidden states, float32 [..., V]."""
    if not self.cfg.head_hidden:
      return matmul(y, self.head).astype(jnp.float32)
    y = y @ self.head_in.astype(y.dtype) + self.head_in_bias.astype(y.dtype)
    y = sharding.replicate_axis(nn.gelu(y, approximate=False))
    y = matmul(y, self.head).astype(jnp.float32)
    return y + self.head_bias.astype(jnp.float32)
