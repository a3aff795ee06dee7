"""Liquid-7B (Wu et al. 2024, arXiv:2412.04332): Gemma with image tokens.

A square grid without end-of-row tokens behind Gemma's text tokens. The
unconditional stream is one token in the place of the text. The image tokenizer
is Chameleon's, its tokens in the order of the codebook.
"""

import pathlib

import ml_collections

from ssd_jax.core.config import UserError
from ssd_jax.families import lumina, published, training_defaults
from ssd_jax.families.published import Ids, SquareAfterText

VARIANTS = ("7b",)
_INSTRUCTION = " Generate an image based on this description."
_START, _IMAGE, _NO_TEXT = "<bos>", "<boi>", "<unconditional>"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the settings of the published size, "7b"."""
  variant = variant or "7b"
  if variant not in VARIANTS:
    raise published.unknown_variant("liquid", variant, VARIANTS)
  config = ml_collections.ConfigDict()
  config.family = "liquid"
  config.workdir = "runs/liquid"
  config.trunk = ml_collections.ConfigDict(dict(
      d_model=3072, n_layers=28, n_heads=16, n_kv_heads=16, head_dim=256,
      d_ff=24_576, vocab_in=256_000 + 8192, vocab_out=8192, norm_eps=1e-6,
      norm_offset=True, gate="gelu_tanh"))
  config.vq = lumina.chameleon().vq
  config.theta = 10_000.0
  config.side = 32  # image tokens, of 16 px
  config.tokenizer = "tokenizer.json"
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=7.0, temperature=0.99, top_k=4096, top_p=0.96))
  training_defaults.add(config, prompts=20_000, batch=4 * 32)
  return config


class Liquid(SquareAfterText):
  """The Liquid family."""

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the text with an instruction, and the token of no text."""
    start, image, no_text = map(self._id, (_START, _IMAGE, _NO_TEXT))
    prompt = (start, *self.text_ids(text + _INSTRUCTION), image)
    return prompt, (start, no_text, image)

  def _id(self, token: str) -> int:
    names = (_START, _IMAGE, _NO_TEXT)
    if self.folder is None:
      return self.trunk.vocab_in - self.trunk.vocab_out - 1 - names.index(token)
    found = self.text_tokenizer.token_to_id(token)
    if found is None:
      raise UserError(
          f"Expected Liquid's tokenizer, got a tokenizer without {token!r}. "
          "Convert again with its tokenizer.json.")
    return found


def from_settings(settings: dict, folder: pathlib.Path | None) -> Liquid:
  """Returns the family described by a model.json."""
  return Liquid(ml_collections.ConfigDict(settings["config"]), folder)
