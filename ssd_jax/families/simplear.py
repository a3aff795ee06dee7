"""SimpleAR 0.5B and 1.5B (Wang et al. 2025, arXiv:2504.11455).

A Qwen2.5 language model with image tokens behind its text tokens: a square grid
without end-of-row tokens, whose unconditional stream is a negative prompt. The
image tokenizer is Cosmos DV8x16x16 (NVIDIA 2025, arXiv:2501.03575), whose
codebook is computed. The published sampler maps a text token that is sampled
inside an image to the first or last image token; here only image tokens have
logits, which is the same distribution given that an image token is sampled.
"""

import functools
import pathlib

import ml_collections

from ssd_jax.core.config import UserError
from ssd_jax.families import published, training_defaults
from ssd_jax.families.published import Ids, SquareAfterText

VARIANTS = ("0.5b", "1.5b")
CHOICES = ("side", "prefix", "negative")  # may be set in each call
ADDED = ("<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>",
         "<|sov|>")  # what the authors added to Qwen2.5's tokens
_OPENING, _IMAGE = "<|t2i|>", "<|soi|>"


def cosmos() -> ml_collections.ConfigDict:
  """Returns the settings of Cosmos DV8x16x16, for single images."""
  return ml_collections.ConfigDict(dict(
      ch=128, ch_mult=(2, 4, 4), num_res_blocks=2, z_channels=16,
      n_codes=64_000, code_dim=6, l2_norm=False, attn_levels=(), patch=4,
      groups=1, levels=(8, 8, 8, 5, 5, 5), frame_levels=(1,)))


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the settings of a size; "" is "0.5b"."""
  variant = variant or "0.5b"
  if variant not in VARIANTS:
    raise published.unknown_variant("simplear", variant, VARIANTS)
  sizes = {
      "0.5b": dict(d_model=896, n_layers=24, n_heads=14, head_dim=64,
                   d_ff=4864),
      "1.5b": dict(d_model=1536, n_layers=28, n_heads=12, head_dim=128,
                   d_ff=8960),
  }[variant]
  config = ml_collections.ConfigDict()
  config.family = "simplear"
  config.workdir = f"runs/simplear_{variant}"
  config.trunk = ml_collections.ConfigDict(dict(
      **sizes, n_kv_heads=2, vocab_in=151_672 + 64_000, vocab_out=64_000,
      norm_eps=1e-6, qkv_bias=True))
  config.vq = cosmos()
  config.theta = 1_000_000.0
  config.side = 64  # image tokens, of 16 px
  config.first_added = 151_665  # id of the first added token
  config.prefix = "A highly realistic image of "
  config.negative = (
      "An image of aerial view, overexposed, low quality, deformation, a poor "
      "composition, bad hands, bad teeth, bad eyes, bad limbs, distortion")
  config.tokenizer = "tokenizer.json"
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=6.0, temperature=1.0, top_k=0, top_p=1.0))
  training_defaults.add(config, prompts=20_000, batch=4 * 32)
  return config


class SimpleAR(SquareAfterText):
  """The SimpleAR family."""

  rounds_pixels = True

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the prefix and the text, and the negative prompt."""
    return (self._prompt(self.config.prefix + text),
            self._prompt(self.config.negative))

  def _prompt(self, text: str) -> Ids:
    return self._id(_OPENING), *self.text_ids(text), self._id(_IMAGE)

  def _id(self, token: str) -> int:
    return self.config.first_added + ADDED.index(token)

  @functools.cached_property
  def text_tokenizer(self):
    """The checkpoint's text tokenizer, with its ids checked.

    Qwen2.5's own, which lacks the added tokens, spells texts alike.
    """
    tokenizer = super().text_tokenizer
    first = self.config.first_added
    ids = [tokenizer.token_to_id(token) for token in ADDED]
    count = tokenizer.get_vocab_size()
    is_theirs = ids == list(range(first, first + len(ADDED)))
    is_qwen = ids == [None] * len(ADDED) and count == first
    if not (is_theirs or is_qwen):
      raise UserError(
          f"Expected SimpleAR's tokenizer with {ADDED[0]} at id {first}, or "
          f"Qwen2.5's with {first} tokens, got one of {count} tokens with "
          f"{ADDED[0]} at {ids[0]}. Convert again with the checkpoint's own.")
    return tokenizer


def from_settings(settings: dict, folder: pathlib.Path | None) -> SimpleAR:
  """Returns the family described by a model.json."""
  return SimpleAR(ml_collections.ConfigDict(settings["config"]), folder)
