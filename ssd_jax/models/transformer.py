"""The decoder-only trunk of every family: one module, driven by its config.

Pre-norm RMSNorm, SwiGLU, no biases, rotary positions given per slot, optional
per-head LayerNorm of queries and keys (Chameleon). Layers are stacked along
axis 0 of their parameters and run by `nn.scan`; the cache rides in the carry,
so that no second copy of it is made. Or they are apart, one after another in
the program: see models/apart.py.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssd_jax import sharding
from ssd_jax.models import int8
from ssd_jax.models.rope import rotate
from ssd_jax.types import KVCache


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
  """Sizes and options of a trunk.

  Attributes:
    d_model: Width D.
    n_layers: Layers L.
    n_heads: Query heads.
    n_kv_heads: Key/value heads K.
    head_dim: Head dimension H.
    d_ff: SwiGLU hidden width F.
    vocab_in: Rows of the input table.
    vocab_out: Image codes V, the outputs of the head.
    norm_eps: Of RMSNorm.
    qk_norm: LayerNorm with scale and bias on each head of q and k, before the
      rotation (Chameleon).
    interleaved: Rotary pairs are neighbours (LlamaGen) instead of halves.
    head_hidden: Width of the head's hidden layer, which has biases and an
      exact GELU (Janus); 0 for a linear head without bias.
    caption_dim: Width of a text encoder's features, which two linear maps with
      a GELU between bring to D (LlamaGen); 0 if prompts are tokens.
    caption_slots: Rows of the unconditional caption's features.
    remat: Recompute each layer in the backward pass.
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
  qk_norm: bool = False
  interleaved: bool = False
  head_hidden: int = 0
  caption_dim: int = 0
  caption_slots: int = 0
  remat: bool = False


_dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class RMSNorm(nn.Module):
  """Root-mean-square norm; statistics in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the input's shape and dtype."""
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)


class HeadNorm(nn.Module):
  """LayerNorm over the head dimension with scale and bias per head."""

  @nn.compact
  def __call__(self, x_SQNH: jax.Array) -> jax.Array:
    """Returns an array of the input's shape and dtype."""
    shape = x_SQNH.shape[-2:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    x = x_SQNH.astype(jnp.float32)
    x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    return (x * scale + bias).astype(x_SQNH.dtype)


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


def written(
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


class Attention(nn.Module):
  """Grouped-query attention over the cache, or over the queries themselves."""

  cfg: TrunkConfig

  @nn.compact
  def __call__(self, x_SQD, cos_sin_SQh2, visible_SQX, cache, layer, slots_SQ):
    """Returns (output [S, Q, D], cache)."""
    cfg = self.cfg
    heads = {"q": cfg.n_heads, "k": cfg.n_kv_heads, "v": cfg.n_kv_heads}
    q, k, v = (
        jnp.einsum(
            "sqd,dnh->sqnh", x_SQD,
            self.param(
                name, nn.initializers.variance_scaling(
                    1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2)),
                (cfg.d_model, n, cfg.head_dim),
            ).astype(x_SQD.dtype),
        )
        for name, n in heads.items()
    )
    if cfg.qk_norm:
      q, k = HeadNorm(name="q_norm")(q), HeadNorm(name="k_norm")(k)
    q = rotate(q, cos_sin_SQh2, cfg.interleaved)
    k = rotate(k, cos_sin_SQh2, cfg.interleaved)
    if cache is not None:
      cache = KVCache(written(cache.k, layer, slots_SQ, k),
                      written(cache.v, layer, slots_SQ, v))
      k, v = cache.k[layer].astype(q.dtype), cache.v[layer].astype(q.dtype)
    else:
      k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    y = attend(q, k, v, visible_SQX)
    o = self.param(
        "o", nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2),
        (cfg.n_heads, cfg.head_dim, cfg.d_model),
    )
    # One product of two matrices: left to itself XLA turns the weights around.
    y_SQE = y.reshape(*y.shape[:2], -1)
    return y_SQE @ o.astype(y.dtype).reshape(-1, cfg.d_model), cache


class SwiGLU(nn.Module):
  """down(silu(gate(x)) * up(x)), bias-free."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns an array of the input's shape."""
    d = x.shape[-1]
    gate = self.param("gate", _dense, (d, self.features)).astype(x.dtype)
    up = self.param("up", _dense, (d, self.features)).astype(x.dtype)
    down = self.param("down", _dense, (self.features, d)).astype(x.dtype)
    return (nn.silu(x @ gate) * (x @ up)) @ down


class Layer(nn.Module):
  """One pre-norm block; the scanned body.

  Attributes:
    cfg: Of the trunk.
    input_norm: Whether attention's input is normalised.
    emit: Whether the output is also given to the scan.
  """

  cfg: TrunkConfig
  input_norm: bool = True
  emit: bool = False

  @nn.compact
  def __call__(self, carry, layer, cos_sin, visible, slots):
    """Returns ((x, cache), x or None)."""
    x, cache = carry
    cfg = self.cfg
    y = RMSNorm(cfg.norm_eps, name="attn_norm")(x) if self.input_norm else x
    y, cache = Attention(cfg, name="attn")(
        y, cos_sin, visible, cache, layer, slots)
    x = sharding.whole(x + y)
    y = RMSNorm(cfg.norm_eps, name="mlp_norm")(x)
    x = sharding.whole(x + SwiGLU(cfg.d_ff, name="mlp")(y))
    return (x, cache), x if self.emit else None


class Trunk(nn.Module):
  """Tokens -> hidden states before the final norm -> image logits.

  Attributes:
    cfg: Sizes and options.
    taps: Layers whose outputs are appended to the hidden states.
    packed: Whether the layers' matrices are in int8.
    apart: Whether each layer has parameters of its own.
  """

  cfg: TrunkConfig
  taps: tuple[int, ...] = ()
  packed: bool = False
  apart: bool = False

  def setup(self):  # noqa: D102
    cfg = self.cfg
    self.embedding = self.param(
        "embedding", nn.initializers.normal(0.02), (cfg.vocab_in, cfg.d_model)
    )
    block = nn.remat(Layer, prevent_cse=False) if cfg.remat else Layer
    block = int8.dequantized(block) if self.packed else block
    if self.apart:
      self.layers = [
          block(cfg, emit=bool(self.taps)) for _ in range(cfg.n_layers)]
    else:
      self.layers = nn.scan(
          block,
          variable_axes={"params": 0},
          split_rngs={"params": True},
          in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
          length=cfg.n_layers,
          metadata_params={nn.PARTITION_NAME: "layers"},
      )(cfg, emit=bool(self.taps))
    self.final_norm = RMSNorm(cfg.norm_eps)
    width = cfg.head_hidden or cfg.d_model
    self.head = self.param("head", _dense, (width, cfg.vocab_out))
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
    """Hidden states before the final norm, and the cache with them written.

    Args:
      x_SQD: Embedded tokens.
      cos_sin_SQh2: Rows of the rotary table.
      visible_SQX: What each query sees; without a cache, of the queries.
      cache: Keys and values of every slot, or None.
      slots_SQ: Where the queries are written; out of range is dropped.
    """
    carry = (sharding.whole(x_SQD), cache)
    rest = (cos_sin_SQh2, visible_SQX, slots_SQ)
    if self.apart:
      every_LSQD = []
      for index, layer in enumerate(self.layers):
        carry, x_SQD = layer(carry, index, *rest)
        every_LSQD.append(x_SQD)
    else:
      carry, every_LSQD = self.layers(
          carry, jnp.arange(self.cfg.n_layers), *rest)
    x_SQD, cache = carry
    x_SQD = sharding.whole(x_SQD)  # else what follows would cut the loop's
    if self.taps:
      tapped = [every_LSQD[layer] for layer in self.taps]
      x_SQD = jnp.concatenate([x_SQD, *tapped], axis=-1)
    return x_SQD, cache

  def init_all(self, x_SQD, cos_sin_SQh2, visible_SQX):
    """Touches every parameter, for `init`."""
    if self.cfg.caption_dim:
      self.embed_caption(jnp.zeros((1, 1, self.cfg.caption_dim)), jnp.ones(
          (1, 1), jnp.int32))
    return self.logits(self(x_SQD, cos_sin_SQh2, visible_SQX)[0])

  def embed(self, ids: jax.Array) -> jax.Array:
    """Rows of the input table."""
    return self.embedding[ids]

  def embed_caption(
      self, features_SPE: jax.Array, ids_SP: jax.Array
  ) -> jax.Array:
    """[S, P, D], of a text encoder's features where the id is 0, else of row
    id - 1 of the unconditional caption.
    """
    null = self.caption_null[jnp.maximum(ids_SP - 1, 0)]
    x = jnp.where(ids_SP[..., None] > 0, null, features_SPE)
    x = nn.gelu(x @ self.caption_in.astype(x.dtype), approximate=True)
    return x @ self.caption_out.astype(x.dtype)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """float32 [..., V], image logits of pre-norm hidden states."""
    return self.project(self.normalize(hidden))

  def normalize(self, hidden: jax.Array) -> jax.Array:
    """Hidden states after the final norm, without what was tapped."""
    return self.final_norm(hidden[..., :self.cfg.d_model])

  def project(self, y: jax.Array) -> jax.Array:
    """float32 [..., V], image logits of normalised hidden states."""
    if not self.cfg.head_hidden:
      return (y @ self.head.astype(y.dtype)).astype(jnp.float32)
    y = y @ self.head_in.astype(y.dtype) + self.head_in_bias.astype(y.dtype)
    y = sharding.whole(nn.gelu(y, approximate=False))
    y = (y @ self.head.astype(y.dtype)).astype(jnp.float32)
    return y + self.head_bias.astype(jnp.float32)
