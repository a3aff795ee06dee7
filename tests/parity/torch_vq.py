"""The published image tokenizers in plain PyTorch, attribute by attribute.

Written from the papers and the published tensors' names, independent of the
JAX code: LlamaGen's VQGAN; and the decoder with the names of
taming-transformers (Chameleon), which transformers lacks.
"""

import torch
from torch import nn
import torch.nn.functional as F


def norm(channels):
  return nn.GroupNorm(32, channels, eps=1e-6)


class Res(nn.Module):

  def __init__(self, c_in, c_out):
    super().__init__()
    self.norm1, self.norm2 = norm(c_in), norm(c_out)
    self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
    self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
    if c_in != c_out:
      self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

  def forward(self, x):
    h = self.conv1(F.silu(self.norm1(x)))
    h = self.conv2(F.silu(self.norm2(h)))
    return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attn(nn.Module):

  def __init__(self, c):
    super().__init__()
    self.norm = norm(c)
    self.q, self.k, self.v, self.proj_out = (
        nn.Conv2d(c, c, 1) for _ in range(4))

  def forward(self, x):
    b, c, h, w = x.shape
    y = self.norm(x)
    q, k, v = (f(y).flatten(2).transpose(1, 2)
               for f in (self.q, self.k, self.v))
    y = torch.softmax(q @ k.transpose(1, 2) / c**0.5, dim=-1) @ v
    return x + self.proj_out(y.transpose(1, 2).reshape(b, c, h, w))


class Down(nn.Module):

  def __init__(self, c):
    super().__init__()
    self.conv = nn.Conv2d(c, c, 3, stride=2)

  def forward(self, x):
    return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):

  def __init__(self, c):
    super().__init__()
    self.conv = nn.Conv2d(c, c, 3, padding=1)

  def forward(self, x):
    return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
  """Blocks of one resolution; the names of its parts are the style's."""

  def __init__(self, c_in, c_out, count, with_attn, blocks):
    super().__init__()
    self.blocks = blocks
    setattr(self, blocks, nn.ModuleList(
        Res(c_in if i == 0 else c_out, c_out) for i in range(count)))
    self.attn = nn.ModuleList(Attn(c_out) for _ in range(count if with_attn
                                                         else 0))

  def forward(self, x):
    for i, block in enumerate(getattr(self, self.blocks)):
      x = block(x)
      if len(self.attn):
        x = self.attn[i](x)
    return x


class Middle(nn.Module):

  def __init__(self, c):
    super().__init__()
    self.block_1, self.attn_1, self.block_2 = Res(c, c), Attn(c), Res(c, c)

  def forward(self, x):
    return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):

  def __init__(self, ch, mult, n_res, z):
    super().__init__()
    self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
    self.conv_blocks, c = nn.ModuleList(), ch
    for i, m in enumerate(mult):
      last = i == len(mult) - 1
      self.conv_blocks.append(Level(c, ch * m, n_res, last, "res"))
      c = ch * m
      if not last:
        self.conv_blocks[-1].downsample = Down(c)
    self.mid = nn.ModuleList([Res(c, c), Attn(c), Res(c, c)])
    self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, z, 3, padding=1)

  def forward(self, x):
    x = self.conv_in(x)
    for level in self.conv_blocks:
      x = level(x)
      if hasattr(level, "downsample"):
        x = level.downsample(x)
    x = run_middle(self.mid, x)
    return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
  """`style` is "raster" (LlamaGen) or "taming" (Chameleon)."""

  def __init__(self, ch, mult, n_res, z, style, with_attn=False):
    super().__init__()
    self.raster = style == "raster"
    with_attn = with_attn or self.raster
    c = ch * mult[-1]
    self.conv_in = nn.Conv2d(z, c, 3, padding=1)
    self.mid = (nn.ModuleList([Res(c, c), Attn(c), Res(c, c)]) if self.raster
                else Middle(c))
    levels = []  # in the order they run
    for i in reversed(range(len(mult))):
      last = i == len(mult) - 1
      levels.append(Level(c, ch * mult[i], n_res + 1, with_attn and last,
                          "res" if self.raster else "block"))
      c = ch * mult[i]
      if i:
        levels[-1].upsample = Up(c)
    if self.raster:
      self.conv_blocks = nn.ModuleList(levels)
    else:
      self.up = nn.ModuleList(reversed(levels))
    self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, 3, 3, padding=1)

  def forward(self, x):
    x = run_middle(self.mid, self.conv_in(x))
    levels = self.conv_blocks if self.raster else reversed(self.up)
    for level in levels:
      x = level(x)
      if hasattr(level, "upsample"):
        x = level.upsample(x)
    return self.conv_out(F.silu(self.norm_out(x)))


def run_middle(mid, x):
  for part in mid if isinstance(mid, nn.ModuleList) else [mid]:
    x = part(x)
  return x


class Quantizer(nn.Module):

  def __init__(self, codes, dim):
    super().__init__()
    self.embedding = nn.Embedding(codes, dim)


class Tokenizer(nn.Module):
  """LlamaGen's: codes are compared on the unit sphere."""

  def __init__(self, ch, mult, n_res, z, codes, dim):
    super().__init__()
    self.encoder = Encoder(ch, mult, n_res, z)
    self.decoder = Decoder(ch, mult, n_res, z, "raster")
    self.quantize = Quantizer(codes, dim)
    self.quantize.register_buffer("codebook_used", torch.zeros(65536))
    self.quant_conv = nn.Conv2d(z, dim, 1)
    self.post_quant_conv = nn.Conv2d(dim, z, 1)

  def tensors(self):
    return self.state_dict()

  def codes(self):
    return F.normalize(self.quantize.embedding.weight, dim=-1)

  @torch.no_grad()
  def encode(self, pixels):
    """int64 [B, R, C] of pixels [B, 3, H, W] in [-1, 1]."""
    z = self.quant_conv(self.encoder(pixels)).permute(0, 2, 3, 1)
    z = F.normalize(z, dim=-1)
    flat = z.reshape(-1, z.shape[-1])
    return torch.cdist(flat, self.codes()).argmin(-1).reshape(z.shape[:-1])

  @torch.no_grad()
  def decode(self, ids):
    """Pixels [B, 3, H, W] of ids [B, R, C]."""
    z = self.codes()[ids].permute(0, 3, 1, 2)
    return self.decoder(self.post_quant_conv(z))


class IBQEncoder(nn.Module):
  """The encoder with taming-transformers' names."""

  def __init__(self, ch, mult, n_res, z):
    super().__init__()
    self.conv_in, c = nn.Conv2d(3, ch, 3, padding=1), ch
    self.down = nn.ModuleList()
    for i, m in enumerate(mult):
      last = i == len(mult) - 1
      self.down.append(Level(c, ch * m, n_res, last, "block"))
      c = ch * m
      if not last:
        self.down[-1].downsample = Down(c)
    self.mid = Middle(c)
    self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, z, 3, padding=1)

  def forward(self, x):
    x = self.conv_in(x)
    for level in self.down:
      x = level(x)
      if hasattr(level, "downsample"):
        x = level.downsample(x)
    return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class IBQ(nn.Module):
  """Emu3.5's: taming's names, attention at the lowest level, dot products."""

  def __init__(self, ch, mult, n_res, z, codes, dim):
    super().__init__()
    self.encoder = IBQEncoder(ch, mult, n_res, z)
    self.decoder = Decoder(ch, mult, n_res, z, "taming", with_attn=True)
    self.quantize = Quantizer(codes, dim)
    self.quant_conv = nn.Conv2d(z, dim, 1)
    self.post_quant_conv = nn.Conv2d(dim, z, 1)

  def tensors(self):
    return self.state_dict()

  @torch.no_grad()
  def encode(self, pixels):
    """int64 [B, R, C] of pixels [B, 3, H, W] in [-1, 1]."""
    z = self.quant_conv(self.encoder(pixels)).permute(0, 2, 3, 1)
    return (z @ self.quantize.embedding.weight.T).argmax(-1)

  @torch.no_grad()
  def decode(self, ids):
    """Pixels [B, 3, H, W] of ids [B, R, C]."""
    z = self.quantize.embedding(ids).permute(0, 3, 1, 2)
    return self.decoder(self.post_quant_conv(z))
