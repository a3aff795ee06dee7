"""The encoder of T5 1.1 (Raffel et al. 2020, arXiv:1910.10683), for captions.

It has no biases and does not scale attention scores. Positions enter only as an
attention bias per distance bucket, which all layers share.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.config import check_sizes
from ssd_jax.models.norms import RMSNorm

_dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes of the encoder; the defaults are those of flan-t5-xl.

  Attributes:
    d_model: Width D.
    n_layers: Number of layers.
    n_heads: Number of heads.
    head_dim: Head dimension.
    d_ff: Width of the gated layer.
    vocab: Rows of the input table.
    buckets: Number of distance buckets, half of them for each direction.
    max_distance: Distances from here on share a bucket.
    eps: Epsilon of the norms.
  """

  d_model: int = 2048
  n_layers: int = 24
  n_heads: int = 32
  head_dim: int = 64
  d_ff: int = 5120
  vocab: int = 32_128
  buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6

  def __post_init__(self):
    check_sizes(self)


class T5Layer(nn.Module):
  """Attention and a gated layer, each after a norm; the body of the scan."""

  cfg: T5Config

  @nn.compact
  def __call__(self, x_BTD: jax.Array, bias_BNTT: jax.Array):
    """Returns (x, None)."""
    cfg = self.cfg
    n, h = cfg.n_heads, cfg.head_dim
    y = RMSNorm(cfg.eps, name="attn_norm")(x_BTD)
    q, k, v = (
        jnp.einsum("btd,dnh->btnh", y, self._weight(
            name, (cfg.d_model, n, h)).astype(y.dtype))
        for name in ("q", "k", "v"))
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k).astype(jnp.float32)
    weights = jax.nn.softmax(scores + bias_BNTT, axis=-1).astype(y.dtype)
    y = jnp.einsum("bnqk,bknh->bqnh", weights, v)
    o = self._weight("o", (n, h, cfg.d_model)).astype(y.dtype)
    x_BTD += jnp.einsum("btnh,nhd->btd", y, o)
    y = RMSNorm(cfg.eps, name="mlp_norm")(x_BTD)
    gate, up, down = (
        self._weight(name, shape).astype(y.dtype) for name, shape in (
            ("gate", (cfg.d_model, cfg.d_ff)), ("up", (cfg.d_model, cfg.d_ff)),
            ("down", (cfg.d_ff, cfg.d_model))))
    y = nn.gelu(y @ gate, approximate=True) * (y @ up)
    return x_BTD + y @ down, None

  def _weight(self, name: str, shape: tuple[int, ...]) -> jax.Array:
    return self.param(name, _dense, shape)


class T5Encoder(nn.Module):
  """Encodes the token ids of a text as features."""

  cfg: T5Config

  @nn.compact
  def __call__(self, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Returns features [B, T, D], undefined where the mask is False."""
    cfg = self.cfg
    table = self.param(
        "embedding", nn.initializers.normal(1.0), (cfg.vocab, cfg.d_model))
    distance = self.param(
        "distance", nn.initializers.normal(0.1), (cfg.buckets, cfg.n_heads))
    buckets_TT = distance_buckets(cfg, ids_BT.shape[1])
    bias_NTT = jnp.moveaxis(distance[buckets_TT], -1, 0).astype(jnp.float32)
    hidden = jnp.where(mask_BT[:, None, None], 0.0, jnp.finfo(jnp.float32).min)
    layers = nn.scan(
        T5Layer, variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=nn.broadcast, length=cfg.n_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(cfg, name="layers")
    x, _ = layers(table[ids_BT], bias_NTT[None] + hidden)
    return RMSNorm(cfg.eps, name="final_norm")(x)


def distance_buckets(cfg: T5Config, length: int) -> np.ndarray:
  """Returns the distance bucket of each (query, key) pair, int [T, T].

  Half of each direction's buckets hold one distance each; the others grow
  logarithmically up to `max_distance`.
  """
  away = np.arange(length)[None, :] - np.arange(length)[:, None]
  half = cfg.buckets // 2
  exact = half // 2
  distance = np.abs(away)
  growth = np.log(np.maximum(distance, 1) / exact, dtype=np.float32) / np.log(
      cfg.max_distance / exact, dtype=np.float32)
  far = exact + (growth * (half - exact)).astype(int)
  bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
  return bucket + half * (away > 0)
