"""diffusers' tokenizer with spatial norms, its tensors named as published."""

import re

import diffusers
import torch


class MoVQ:
  """MoVQGAN: raw codebook vectors modulate the decoder."""

  def __init__(self, ch, mult, n_res, z, codes, dim):
    levels = len(mult)
    down = ["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"]
    up = ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (levels - 1)
    self.levels = levels
    self.network = diffusers.VQModel(
        down_block_types=down, up_block_types=up,
        block_out_channels=[ch * m for m in mult], layers_per_block=n_res,
        latent_channels=z, num_vq_embeddings=codes, vq_embed_dim=dim,
        norm_type="spatial").eval().requires_grad_(False)

  def tensors(self):
    return {self._published(name): x[..., None, None]
            if re.search(r"(to_[qkv]|to_out\.0)\.weight", name) else x
            for name, x in self.network.state_dict().items()}

  def _published(self, name):
    """The published name of a tensor of diffusers."""
    level = lambda m: str(self.levels - 1 - int(m[1]))
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda m: "up." + level(m), name)
    for theirs, ours in (
        ("resnets.", "block."), ("attentions.", "attn."),
        ("conv_shortcut", "nin_shortcut"), ("samplers.0", "sample"),
        ("mid_block.block.0", "mid.block_1"),
        ("mid_block.block.1", "mid.block_2"),
        ("mid_block.attn.0", "mid.attn_1"), ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"), ("spatial_norm", "norm"), ("to_q", "q"),
        ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
      name = name.replace(theirs, ours)
    return name

  @torch.no_grad()
  def encode(self, pixels):
    """int64 [B, R, C] of pixels [B, 3, H, W]."""
    latents = self.network.encode(pixels).latents
    indices = self.network.quantize(latents)[2][2]
    return indices.reshape(latents.shape[0], *latents.shape[2:])

  @torch.no_grad()
  def decode(self, codes):
    """Pixels of codes [B, R, C]."""
    z = self.network.quantize.embedding(codes).permute(0, 3, 1, 2)
    return self.network.decode(z, force_not_quantize=True).sample
