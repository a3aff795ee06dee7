"""Vector-quantised image tokenizer: one module for every family.

Encoder -> quantiser -> decoder of VQGAN (Esser et al. 2021, arXiv:2012.09841),
configured to hold the published tokenizers (LlamaGen and Janus VQ-16/VQ-8,
Chameleon, MoVQ, IBQ, Emu3 and Cosmos for single images) and our own. Levels are
numbered in the encoder's order: level 0 has the highest resolution. All arrays
are NHWC.

B batch, H height, W width, C channels, R rows and C columns of the grid,
V codebook entries, Z codebook dimension.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssd_jax.core.config import check, check_sizes
from ssd_jax.models import codebook_search, fsq


@dataclasses.dataclass(frozen=True)
class VQConfig:
  """Sizes of a tokenizer.

  Attributes:
    ch: Channels of level 0.
    ch_mult: Channel multiplier of each level; each level after the first halves
      the resolution.
    num_res_blocks: Residual blocks per encoder level; the decoder has one more.
    z_channels: Channels of the latent before `quant_conv`.
    n_codes: Codebook size V.
    code_dim: Codebook dimension Z.
    l2_norm: Whether codebook entries are compared and looked up on the unit
      sphere (LlamaGen, Janus).
    attn_levels: Levels whose residual blocks are followed by self-attention.
    dot: Whether latents take the entry of the largest dot product instead of
      the nearest one (IBQ).
    levels: Values per dimension of a codebook that is not stored but computed,
      the first one varying fastest (FSQ; Cosmos); () for a stored codebook.
    patch: Side of the pixel blocks folded into channels at the input, and
      unfolded at the output; 1 in all published tokenizers but Cosmos.
    groups: Groups of the group norm.
    priced: Whether each codebook entry has a price, which is added to its
      squared distance in quantisation; training sets it by the entry's rarity
      (our own tokenizer).
    spatial: Whether the quantised latents modulate the decoder's norms (MoVQ).
    video: Whether latents pass through a video tokenizer's temporal layers, and
      then modulate as with `spatial` (Emu3).
    frame_levels: Levels whose upsampling also repeats frames in a video
      tokenizer of separate layers for space and time (Cosmos). What remains of
      its temporal layers for a single image are 1x1 convolutions there and
      after the attention of the lowest resolution.
  """

  ch: int = 128
  ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  z_channels: int = 256
  n_codes: int = 16384
  code_dim: int = 8
  l2_norm: bool = True
  attn_levels: tuple[int, ...] = (4,)
  patch: int = 1
  groups: int = 32
  priced: bool = False
  video: bool = False
  spatial: bool = False
  dot: bool = False
  levels: tuple[int, ...] = ()
  frame_levels: tuple[int, ...] = ()

  def __post_init__(self):
    check_sizes(self)
    check(len(self.ch_mult) > 0 and all(
        m >= 1 and self.ch * m % self.groups == 0
        for m in self.ch_mult), "ch_mult", self.ch_mult,
        f"whole numbers that make ch={self.ch} channels multiples of "
        f"groups={self.groups}")
    is_fsq = math.prod(self.levels) == self.n_codes and len(
        self.levels) == self.code_dim and min(self.levels, default=0) > 1
    check(not self.levels or is_fsq, "levels", self.levels,
          f"code_dim={self.code_dim} numbers above 1 whose product is n_codes="
          f"{self.n_codes}")

  @property
  def is_modulated(self) -> bool:
    """Whether the quantised latents modulate the decoder's norms."""
    return self.spatial or self.video

  @property
  def downsample(self) -> int:
    """Pixels per image token along one side."""
    return self.patch * 2 ** (len(self.ch_mult) - 1)


def _conv(features: int, kernel: int, name: str, **kwargs) -> nn.Conv:
  return nn.Conv(features, (kernel, kernel), name=name, **kwargs)


def _norm(cfg: VQConfig, name: str, codes_BRCZ: jax.Array | None = None):
  if codes_BRCZ is None:
    return nn.GroupNorm(cfg.groups, epsilon=1e-6, name=name)
  return functools.partial(SpatialNorm(cfg, name=name), codes_BRCZ=codes_BRCZ)


class SpatialNorm(nn.Module):
  """Group norm, scaled and shifted by the quantised latents.

  Source: Zheng et al. 2022, MoVQ, arXiv:2209.09002, section 3.2.
  """

  cfg: VQConfig

  @nn.compact
  def __call__(self, x_BHWC: jax.Array, codes_BRCZ: jax.Array) -> jax.Array:
    """Returns an array of the input's shape."""
    features = x_BHWC.shape[-1]
    codes = _nearest(codes_BRCZ, x_BHWC.shape[1] // codes_BRCZ.shape[1])
    scale = _conv(features, 1, "conv_y")(codes)
    return _norm(self.cfg, "norm_layer")(x_BHWC) * scale + _conv(
        features, 1, "conv_b")(codes)


class TimeBlock(nn.Module):
  """A video tokenizer's temporal residual block, applied to a single image.

  Its causal convolutions see zeros for earlier frames, so only the last
  temporal tap remains; its batch norms reduce to a scale and a shift.
  """

  @nn.compact
  def __call__(self, x_BRCZ: jax.Array) -> jax.Array:
    """Returns an array of the input's shape."""
    features = x_BRCZ.shape[-1]
    h = x_BRCZ
    for i in (1, 2):
      h = nn.swish(ChannelAffine(name=f"norm{i}")(h))
      h = _conv(features, 3, f"conv{i}")(h)
    return x_BRCZ + h


class ChannelAffine(nn.Module):
  """A scale and a shift per channel."""

  @nn.compact
  def __call__(self, x_BRCZ: jax.Array) -> jax.Array:
    """Returns an array of the input's shape."""
    shape = x_BRCZ.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape)
    return x_BRCZ * scale + self.param("bias", nn.initializers.zeros, shape)


class ResBlock(nn.Module):
  """Two 3x3 convolutions, each after norm and swish, plus a shortcut."""

  cfg: VQConfig
  features: int

  @nn.compact
  def __call__(
      self, x_BHWC: jax.Array, codes_BRCZ: jax.Array | None = None
  ) -> jax.Array:
    """Returns [B, H, W, features]."""
    h = x_BHWC
    for i in (1, 2):
      h = nn.swish(_norm(self.cfg, f"norm{i}", codes_BRCZ)(h))
      h = _conv(self.features, 3, f"conv{i}")(h)
    if x_BHWC.shape[-1] != self.features:
      x_BHWC = _conv(self.features, 1, "nin_shortcut")(x_BHWC)
    return x_BHWC + h


class AttnBlock(nn.Module):
  """Single-head self-attention over all positions, with a residual."""

  cfg: VQConfig

  @nn.compact
  def __call__(
      self, x_BHWC: jax.Array, codes_BRCZ: jax.Array | None = None
  ) -> jax.Array:
    """Returns an array of the input's shape."""
    b, h, w, c = x_BHWC.shape
    y = _norm(self.cfg, "norm", codes_BRCZ)(x_BHWC)
    q, k, v = (
        _conv(c, 1, name)(y).reshape(b, h * w, c) for name in ("q", "k", "v")
    )
    scores = jnp.einsum("bqc,bkc->bqk", q, k) * c**-0.5
    y = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores, axis=-1), v)
    return x_BHWC + _conv(c, 1, "proj_out")(y.reshape(b, h, w, c))


class FrameAttn(nn.Module):
  """Attention over frames, applied to a single one: it has itself as value."""

  cfg: VQConfig

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """Returns an array of the input's shape."""
    y = _norm(self.cfg, "norm")(x_BHWC)
    return x_BHWC + _conv(x_BHWC.shape[-1], 1, "value")(y)


class MidBlock(nn.Module):
  """Residual block, attention, residual block at the lowest resolution."""

  cfg: VQConfig

  @nn.compact
  def __call__(
      self, x_BHWC: jax.Array, codes_BRCZ: jax.Array | None = None
  ) -> jax.Array:
    """Returns an array of the input's shape."""
    features = x_BHWC.shape[-1]
    x = ResBlock(self.cfg, features, name="block_1")(x_BHWC, codes_BRCZ)
    x = AttnBlock(self.cfg, name="attn_1")(x, codes_BRCZ)
    if self.cfg.frame_levels:
      x = FrameAttn(self.cfg, name="frame_attn_1")(x)
    return ResBlock(self.cfg, features, name="block_2")(x, codes_BRCZ)


class Encoder(nn.Module):
  """Images -> latents before `quant_conv`."""

  cfg: VQConfig

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """Returns [B, H / downsample, W / downsample, z_channels]."""
    cfg = self.cfg
    x = _conv(cfg.ch, 3, "conv_in")(_space_to_depth(x_BHWC, cfg.patch))
    for level, mult in enumerate(cfg.ch_mult):
      for block in range(cfg.num_res_blocks):
        x = ResBlock(cfg, cfg.ch * mult, name=f"down_{level}_block_{block}")(x)
        if level in cfg.attn_levels:
          x = AttnBlock(cfg, name=f"down_{level}_attn_{block}")(x)
      if level + 1 < len(cfg.ch_mult):
        # The published tokenizers pad right and bottom only.
        x = _conv(
            x.shape[-1], 3, f"down_{level}_downsample",
            strides=2, padding=((0, 1), (0, 1)),
        )(x)
    x = MidBlock(cfg, name="mid")(x)
    x = nn.swish(_norm(cfg, "norm_out")(x))
    x = _conv(cfg.z_channels, 3, "conv_out")(x)
    if cfg.video:
      # The image stands for four equal frames; each step halves their number.
      x = nn.swish(_conv(2 * cfg.z_channels, 3, "time_conv_0")(x))
      x = nn.swish(_conv(cfg.z_channels, 3, "time_conv_1")(x))
      for block in range(cfg.num_res_blocks):
        x = TimeBlock(name=f"time_res_{block}")(x)
    return x


class Decoder(nn.Module):
  """Latents after `post_quant_conv` -> images."""

  cfg: VQConfig

  @nn.compact
  def __call__(
      self, z_BHWC: jax.Array, codes_BRCZ: jax.Array | None = None
  ) -> jax.Array:
    """Returns [B, H * downsample, W * downsample, 3], about [-1, 1]."""
    cfg = self.cfg
    if cfg.video:
      assert codes_BRCZ is not None, "a modulated decoder needs the latents"
      z_BHWC, codes_BRCZ = self._first_frame(z_BHWC, codes_BRCZ)
    x = _conv(cfg.ch * cfg.ch_mult[-1], 3, "conv_in")(z_BHWC)
    x = MidBlock(cfg, name="mid")(x, codes_BRCZ)
    for level in reversed(range(len(cfg.ch_mult))):
      features = cfg.ch * cfg.ch_mult[level]
      for block in range(cfg.num_res_blocks + 1):
        name = f"up_{level}_block_{block}"
        x = ResBlock(cfg, features, name=name)(x, codes_BRCZ)
        if level in cfg.attn_levels:
          x = AttnBlock(cfg, name=f"up_{level}_attn_{block}")(x, codes_BRCZ)
      if level in cfg.frame_levels:
        x += _conv(features, 1, f"up_{level}_frames")(x)
      if level:
        x = _conv(features, 3, f"up_{level}_upsample")(_nearest(x, 2))
    x = nn.swish(_norm(cfg, "norm_out", codes_BRCZ)(x))
    return _depth_to_space(_conv(3 * cfg.patch**2, 3, "conv_out")(x), cfg.patch)

  def _first_frame(
      self, z_BRCZ: jax.Array, codes_BRCZ: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Runs both inputs through the same temporal layers."""
    x = jnp.concatenate([z_BRCZ, codes_BRCZ])
    for block in range(self.cfg.num_res_blocks):
      x = TimeBlock(name=f"time_res_{block}")(x)
    for i in range(2):
      x = nn.swish(_conv(x.shape[-1], 3, f"time_conv_{i}")(x))
    z_BRCZ, codes_BRCZ = jnp.split(x, 2)
    return z_BRCZ, codes_BRCZ


class VQ(nn.Module):
  """The whole tokenizer; `encode`, `quantize` and `decode` are its parts."""

  cfg: VQConfig

  def setup(self):  # noqa: D102
    cfg = self.cfg
    self.encoder = Encoder(cfg)
    self.decoder = Decoder(cfg)
    self.quant_conv = nn.Conv(cfg.code_dim, (1, 1))
    self.post_quant_conv = nn.Conv(cfg.z_channels, (1, 1))
    if not cfg.levels:
      self.codebook = self.param(
          "codebook", nn.initializers.normal(1.0), (cfg.n_codes, cfg.code_dim)
      )
    if cfg.priced:
      self.price = self.param("price", nn.initializers.zeros, (cfg.n_codes,))

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """Reconstructs images in [-1, 1]; initialises every parameter."""
    return self.decode(self.quantize(self.encode(x_BHWC)))

  def encode(self, x_BHWC: jax.Array) -> jax.Array:
    """Encodes images in [-1, 1] as latents [B, R, C, Z], not yet quantised."""
    return self.quant_conv(self.encoder(x_BHWC))

  def quantize(self, z_BRCZ: jax.Array) -> jax.Array:
    """Returns the codebook entry of each latent, int32 [B, R, C]."""
    if self.cfg.levels:
      return fsq.quantize(z_BRCZ, self.cfg.levels)
    codes_VZ = self.codes()
    if self.cfg.dot:
      find = functools.partial(codebook_search.best_code, codes_VZ=codes_VZ)
    else:
      find = functools.partial(
          codebook_search.nearest_code, codes_VZ=codes_VZ,
          price_V=self.price if self.cfg.priced else 0.0)
    return codebook_search.in_rows(find, z_BRCZ, len(codes_VZ))

  def decode(self, ids_BRC: jax.Array) -> jax.Array:
    """Decodes image tokens to images [B, H, W, 3], about [-1, 1]."""
    return self.decode_latents(self.codes()[ids_BRC])

  def decode_latents(self, z_BRCZ: jax.Array) -> jax.Array:
    """Decodes quantised latents to images; training differentiates this."""
    codes_BRCZ = z_BRCZ if self.cfg.is_modulated else None
    return self.decoder(self.post_quant_conv(z_BRCZ), codes_BRCZ)

  def codes(self) -> jax.Array:
    """Returns the codebook [V, Z] as it is compared and looked up."""
    if self.cfg.levels:
      return fsq.codebook(self.cfg.levels)
    if not self.cfg.l2_norm:
      return self.codebook
    return codebook_search.unit(self.codebook)


def to_float(image_BHWC: jax.Array) -> jax.Array:
  """Returns uint8 pixels as float32 in [-1, 1]."""
  return image_BHWC.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: jax.Array) -> jax.Array:
  """Converts pixels in [-1, 1] to uint8 by truncation (Chameleon, Janus)."""
  return (jnp.clip((x + 1.0) / 2.0, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def to_uint8_rounded(x: jax.Array) -> jax.Array:
  """Converts pixels in [-1, 1] to uint8 by rounding (LlamaGen, MoVQ)."""
  return jnp.clip(127.5 * x + 128.0, 0.0, 255.0).astype(jnp.uint8)


def _nearest(x_BHWC: jax.Array, factor: int) -> jax.Array:
  return jnp.repeat(jnp.repeat(x_BHWC, factor, axis=1), factor, axis=2)


def _space_to_depth(x_BHWC: jax.Array, patch: int) -> jax.Array:
  b, h, w, c = x_BHWC.shape
  x = x_BHWC.reshape(b, h // patch, patch, w // patch, patch, c)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h // patch, w // patch, patch * patch * c)


def _depth_to_space(x_BHWC: jax.Array, patch: int) -> jax.Array:
  b, h, w, c = x_BHWC.shape
  x = x_BHWC.reshape(b, h, w, patch, patch, c // patch**2)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * patch, w * patch, c // patch**2)
