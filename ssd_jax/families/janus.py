"""Janus-Pro (Chen et al. 2025, arXiv:2501.17811), its image generation.

The grid has 24 x 24 image tokens and no end-of-row tokens. Image tokens have
their own small embedding table, which two linear layers project to the trunk's
width; the result is a fixed table, which conversion computes. The unconditional
stream is the prompt with all tokens but the first and last replaced by padding,
which is visible.
"""

import pathlib

import ml_collections

from ssd_jax.core.config import UserError
from ssd_jax.families import published, training_defaults
from ssd_jax.families.published import Ids, SquareAfterText

VARIANTS = ("1b", "7b")
_START, _PAD, _IMAGE = (
    "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>")


def vq16() -> ml_collections.ConfigDict:
  """Returns the settings of LlamaGen's and Janus' image tokenizer."""
  return ml_collections.ConfigDict(dict(
      ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, z_channels=256,
      n_codes=16384, code_dim=8, l2_norm=True, attn_levels=(4,), groups=32))


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the settings of a size; "" is "1b"."""
  variant = variant or "1b"
  if variant not in VARIANTS:
    raise published.unknown_variant("janus_pro", variant, VARIANTS)
  sizes = {
      "1b": dict(d_model=2048, n_layers=24, n_heads=16, d_ff=5632,
                 head_hidden=2048),
      "7b": dict(d_model=4096, n_layers=30, n_heads=32, d_ff=11008,
                 head_hidden=4096),
  }[variant]
  config = ml_collections.ConfigDict()
  config.family = "janus"
  config.workdir = f"runs/janus_pro_{variant}"
  config.trunk = ml_collections.ConfigDict(dict(
      **sizes, n_kv_heads=sizes["n_heads"], head_dim=128,
      vocab_in=102_400 + 16_384, vocab_out=16_384, norm_eps=1e-6))
  config.vq = vq16()
  config.theta = 10_000.0
  config.side = 24  # image tokens
  config.tokenizer = "tokenizer.json"
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=5.0, temperature=1.0, top_k=0, top_p=1.0))
  training_defaults.add(config, prompts=60_000, batch=4 * 128)
  return config


class Janus(SquareAfterText):
  """The Janus-Pro family."""

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns one turn of a conversation, and as much padding."""
    start, pad, image = map(self._id, (_START, _PAD, _IMAGE))
    words = f"<|User|>: {text.strip()}\n\n<|Assistant|>:"
    prompt = (start, *self.text_ids(words), image)
    return prompt, (start, *[pad] * (len(prompt) - 2), image)

  def _id(self, token: str) -> int:
    if self.folder is None:
      return self.text_rows - 1 - (_START, _PAD, _IMAGE).index(token)
    found = self.text_tokenizer.token_to_id(token)
    if found is None:
      raise UserError(
          f"Expected Janus-Pro's tokenizer, got a tokenizer without {token!r}. "
          "Convert again with its tokenizer.json.")
    return found


def from_settings(settings: dict, folder: pathlib.Path | None) -> Janus:
  """Returns the family described by a model.json."""
  return Janus(ml_collections.ConfigDict(settings["config"]), folder)
