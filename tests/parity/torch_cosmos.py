"""Cosmos' discrete video tokenizer in plain PyTorch, for clips of any length.

Written from its description (arXiv:2501.03575) and the published tensors'
names, independent of the JAX code, which knows single images only: causal
convolutions over frames, Haar wavelets of space and time, finite scalar
quantisation.
"""

import collections
import math

import torch
from torch import nn
import torch.nn.functional as F


class Conv(nn.Module):
  """Pads time by repeating the first frame, space by zeros."""

  def __init__(self, c_in, c_out, kernel, stride=(1, 1, 1), pad=0):
    super().__init__()
    self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride)
    self.back, self.pad = kernel[0] - stride[0], pad

  def forward(self, x):
    x = torch.cat([x[:, :, :1]] * self.back + [x], 2)
    return self.conv3d(F.pad(x, (self.pad,) * 4))


def factorised(c_in, c_out):
  return nn.Sequential(Conv(c_in, c_out, (1, 3, 3), pad=1),
                       Conv(c_out, c_out, (3, 1, 1)))


class Norm(nn.Module):
  """Over all channels and positions of a frame."""

  def __init__(self, c):
    super().__init__()
    self.norm = nn.GroupNorm(1, c, eps=1e-6)

  def forward(self, x):
    frames = [self.norm(x[:, :, t]) for t in range(x.shape[2])]
    return torch.stack(frames, 2)


class Res(nn.Module):

  def __init__(self, c_in, c_out):
    super().__init__()
    self.norm1, self.norm2 = Norm(c_in), Norm(c_out)
    self.conv1, self.conv2 = factorised(c_in, c_out), factorised(c_out, c_out)
    if c_in != c_out:
      self.nin_shortcut = Conv(c_in, c_out, (1, 1, 1))

  def forward(self, x):
    h = self.conv1(F.silu(self.norm1(x)))
    h = self.conv2(F.silu(self.norm2(h)))
    return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attn(nn.Module):
  """Over the positions of a frame, or over the frames of a position."""

  def __init__(self, c, over_time):
    super().__init__()
    self.norm, self.over_time = Norm(c), over_time
    self.q, self.k, self.v, self.proj_out = (
        Conv(c, c, (1, 1, 1)) for _ in range(4))

  def forward(self, x):
    b, c, t, h, w = x.shape
    order = (0, 3, 4, 2, 1) if self.over_time else (0, 2, 3, 4, 1)
    y = self.norm(x)
    q, k, v = (f(y).permute(order) for f in (self.q, self.k, self.v))
    length = t if self.over_time else h * w
    shape = q.shape
    q, k, v = (z.reshape(b, -1, length, c) for z in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=self.over_time)
    back = [order.index(axis) for axis in range(5)]
    return x + self.proj_out(y.reshape(shape).permute(back))


class Middle(nn.Module):

  def __init__(self, c):
    super().__init__()
    self.block_1, self.block_2 = Res(c, c), Res(c, c)
    self.attn_1 = nn.Sequential(Attn(c, False), Attn(c, True))

  def forward(self, x):
    return self.block_2(self.attn_1(self.block_1(x)))


class Down(nn.Module):

  def __init__(self, c, with_time):
    super().__init__()
    self.with_time = with_time
    self.conv1 = Conv(c, c, (1, 3, 3), (1, 2, 2))
    self.conv2 = Conv(c, c, (3, 1, 1), (2, 1, 1))
    self.conv3 = Conv(c, c, (1, 1, 1))

  def forward(self, x):
    x = F.pad(x, (0, 1, 0, 1))
    x = self.conv1(x) + F.avg_pool3d(x, (1, 2, 2))
    if self.with_time:
      x = torch.cat([x[:, :, :1], x], 2)
      x = self.conv2(x) + F.avg_pool3d(x, (2, 1, 1))
    return self.conv3(x)


class Up(nn.Module):

  def __init__(self, c, with_time):
    super().__init__()
    self.with_time = with_time
    self.conv1 = Conv(c, c, (3, 1, 1))
    self.conv2 = Conv(c, c, (1, 3, 3), pad=1)
    self.conv3 = Conv(c, c, (1, 1, 1))

  def forward(self, x):
    if self.with_time:
      if x.shape[2] > 1:
        x = x.repeat_interleave(2, 2)[:, :, 1:]
      x = self.conv1(x) + x
    x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    return self.conv3(self.conv2(x) + x)


class Level(nn.Module):

  def __init__(self, c_in, c_out, count):
    super().__init__()
    self.block = nn.ModuleList(
        Res(c_in if i == 0 else c_out, c_out) for i in range(count))

  def forward(self, x):
    for block in self.block:
      x = block(x)
    return x


def to_bands(x):
  """Two steps of Haar wavelets; the first frame stands for four."""
  x = torch.cat([x[:, :, :1]] * 3 + [x], 2)
  for _ in range(2):
    bands = [x]
    for axis in (2, 3, 4):
      bands = [half for band in bands for half in _halves(band, axis)]
    x = torch.cat(bands, 1)
  return x


def _halves(x, axis):
  even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
  return (even + odd) / 2, (even - odd) / 2


def from_bands(x):
  """The inverse; of the first four frames the last one remains."""
  for _ in range(2):
    bands = list(x.chunk(8, 1))
    for axis in (4, 3, 2):
      bands = [torch.stack([low + high, low - high], axis + 1).flatten(
          axis, axis + 1) for low, high in zip(bands[::2], bands[1::2])]
    x = bands[0]
  return x[:, :, 3:]


class Encoder(nn.Module):

  def __init__(self, ch, mult, n_res, z, time_levels):
    super().__init__()
    self.conv_in, c = factorised(192, ch), ch
    self.down = nn.ModuleList()
    for i, m in enumerate(mult):
      self.down.append(Level(c, ch * m, n_res))
      c = ch * m
      if i + 1 < len(mult):
        self.down[-1].downsample = Down(c, i + 1 in time_levels)
    self.mid, self.norm_out = Middle(c), Norm(c)
    self.conv_out = factorised(c, z)

  def forward(self, x):
    x = self.conv_in(to_bands(x))
    for level in self.down:
      x = level(x)
      if hasattr(level, "downsample"):
        x = level.downsample(x)
    return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):

  def __init__(self, ch, mult, n_res, z, time_levels):
    super().__init__()
    c = ch * mult[-1]
    self.conv_in, self.mid = factorised(z, c), Middle(c)
    levels = []
    for i in reversed(range(len(mult))):
      levels.insert(0, Level(c, ch * mult[i], n_res + 1))
      c = ch * mult[i]
      if i:
        levels[0].upsample = Up(c, i in time_levels)
    self.up = nn.ModuleList(levels)
    self.norm_out, self.conv_out = Norm(c), factorised(c, 192)

  def forward(self, x):
    x = self.mid(self.conv_in(x))
    for level in reversed(self.up):
      x = level(x)
      if hasattr(level, "upsample"):
        x = level.upsample(x)
    return from_bands(self.conv_out(F.silu(self.norm_out(x))))


class Quantizer(nn.Module):
  """Digits and indices, one latent dimension at a time."""

  def __init__(self, levels):
    super().__init__()
    self.levels = levels
    self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32))

  def forward(self, z):
    index, step = 0, 1
    for i, count in enumerate(self.levels):
      half = (count - 1) * 1.001 / 2
      offset = 0.0 if count % 2 else 0.5
      shift = math.atanh(offset / half)
      digit = torch.round(torch.tanh(z[:, i] + shift) * half - offset)
      index, step = index + (digit + count // 2) * step, step * count
    return index.long()

  def values(self, index):
    values = []
    for count in self.levels:
      values.append((index % count - count // 2) / (count // 2))
      index = index // count
    return torch.stack(values, 1).float()


class Tokenizer:
  """Encoder and decoder as they are published, in two files."""

  def __init__(self, ch, mult, n_res, z, levels, time_levels):
    self.quantizer = Quantizer(levels)
    sizes, dim = (ch, mult, n_res, z, time_levels), len(levels)
    named = lambda **parts: nn.Sequential(collections.OrderedDict(parts))
    self.encoder = named(encoder=Encoder(*sizes),
                         quant_conv=Conv(z, dim, (1, 1, 1)),
                         quantizer=self.quantizer)
    self.decoder = named(post_quant_conv=Conv(dim, z, (1, 1, 1)),
                         decoder=Decoder(*sizes))
    for part in (self.encoder, self.decoder):
      part.eval().requires_grad_(False)

  def tensors(self):
    return self.encoder.state_dict() | self.decoder.state_dict()

  def save(self, folder, rows, cols):
    """Writes both files, traced for images of that many tokens."""
    pixels = torch.zeros(1, 3, 1, 16 * rows, 16 * cols)
    latents = torch.zeros(1, len(self.quantizer.levels), 1, rows, cols)
    for part, example, name in ((self.encoder, pixels, "encoder"),
                                (self.decoder, latents, "decoder")):
      traced = torch.jit.trace(part, example, check_trace=False)
      traced.save(folder / f"{name}.jit")

  def encode(self, pixels):
    """int64 [B, R, C] of pixels [B, 3, H, W]."""
    return self.encoder(pixels[:, :, None])[:, 0]

  def decode(self, codes):
    """Pixels of codes [B, R, C]."""
    values = self.quantizer.values(codes)
    return self.decoder(values[:, :, None])[:, :, 0]
