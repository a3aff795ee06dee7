"""transformers' image tokenizers, their tensors named as published."""

import torch
import torch.nn.functional as F
import transformers
from transformers.models.chameleon import modeling_chameleon
from transformers.models.emu3 import modeling_emu3
from transformers.models.janus import modeling_janus

from tests.parity import torch_vq


class Chameleon:
  """Its encoder and codes; transformers has no decoder of it."""

  def __init__(self, ch, mult, n_res, z, codes, dim):
    self.network = modeling_chameleon.ChameleonVQVAE(
        transformers.ChameleonVQVAEConfig(
            embed_dim=dim, num_embeddings=codes, latent_channels=z,
            base_channels=ch, channel_multiplier=list(mult),
            num_res_blocks=n_res))
    self.network.decoder = torch_vq.Decoder(ch, mult, n_res, z, "taming")
    self.network.eval().requires_grad_(False)

  def tensors(self):
    return self.network.state_dict()

  def encode(self, pixels):
    """int64 [B, R, C] of pixels [B, 3, H, W] in [-1, 1]."""
    found = self.network.encode(pixels)
    cells = found.last_hidden_state.shape
    return found.image_tokens.reshape(cells[0], *cells[2:])

  def decode(self, codes):
    """Pixels [B, 3, H, W] of codes [B, R, C]."""
    z = self.network.quantize.embedding(codes).permute(0, 3, 1, 2)
    return self.network.decoder(self.network.post_quant_conv(z))


class Janus:
  """All of it, but for the search of the nearest code."""

  def __init__(self, ch, mult, n_res, z, codes, dim, side):
    self.network = modeling_janus.JanusVQVAE(transformers.JanusVQVAEConfig(
        embed_dim=dim, num_embeddings=codes, latent_channels=z,
        base_channels=ch, channel_multiplier=list(mult), num_res_blocks=n_res,
        num_patches=side))
    self.network.requires_grad_(False)

  def tensors(self):
    tensors = {published_janus(name): x
               for name, x in self.network.state_dict().items()}
    return tensors | {"quantize.codebook_used": torch.zeros(65536)}

  def encode(self, pixels):
    """int64 [B, R, C]; the original compares unit vectors, transformers not."""
    latents = self.network.quant_conv(self.network.encoder(pixels))
    z = F.normalize(latents, dim=1).permute(0, 2, 3, 1)
    table = F.normalize(self.network.quantize.embedding.weight)
    return torch.cdist(z.flatten(0, 2), table).argmin(-1).reshape(z.shape[:3])

  def decode(self, codes):
    """Pixels of as many codes as an image has."""
    return self.network.decode(codes.flatten(1))


class Emu3:
  """All of it, four frames each."""

  def __init__(self, ch, mult, n_res, z, codes, dim):
    levels = len(mult)
    self.network = modeling_emu3.Emu3VQVAE(transformers.Emu3VQVAEConfig(
        codebook_size=codes, embed_dim=dim, latent_channels=z,
        base_channels=ch, channel_multiplier=list(mult), num_res_blocks=n_res,
        attn_resolutions=[levels - 1], hidden_size=ch * mult[-1]))
    self.network.eval().requires_grad_(False)

  def tensors(self):
    return {published_emu3(name): x[..., None, None]
            if "_proj.weight" in name else x
            for name, x in self.network.state_dict().items()}

  @torch.no_grad()
  def encode(self, pixels):
    """int64 [B, R, C] of pixels [B, 3, H, W]."""
    sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
    found = self.network.encode(pixels, image_sizes=sizes)
    return torch.stack(list(found.image_tokens))

  def decode(self, codes):
    """Pixels of codes."""
    return self.network.decode(codes)


def published_janus(name):
  """The published name of a tensor of transformers' Janus tokenizer."""
  for theirs, ours in (
      ("encoder.down.", "encoder.conv_blocks."), (".block.", ".res."),
      ("decoder.up.", "decoder.conv_blocks."), ("mid.block_1.", "mid.0."),
      ("mid.attn_1.", "mid.1."), ("mid.block_2.", "mid.2.")):
    name = name.replace(theirs, ours)
  return name


def published_emu3(name):
  """The published name of a tensor of transformers' Emu3 tokenizer."""
  for theirs, ours in (
      (".down_block.down.", ".down."), (".up_block.up.", ".up."),
      (".middle_block.", ".mid."), (".q_proj.", ".q."), (".k_proj.", ".k."),
      (".v_proj.", ".v."), (".out_proj.", ".proj_out."),
      ("mid.attn_norm.", "mid.attn_1.norm.")):
    name = name.replace(theirs, ours)
  head, norms, tail = name.partition("attn_norms.")
  if norms:
    index, _, rest = tail.partition(".")
    name = f"{head}attn.{index}.norm.{rest}"
  return name
