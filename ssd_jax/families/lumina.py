"""Lumina-mGPT-7B (Liu et al. 2024, arXiv:2408.02657), a Chameleon fine-tune.

Rows end with a forced token. The size of the picture stands in the prompt, as
words and as two tokens. The unconditional stream has no text at all: it starts
at the begin-of-image token, and so do its positions.
"""

import functools
import pathlib
import re

import ml_collections
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.families import published, training_defaults
from ssd_jax.families.published import Ids, Published

VARIANTS = ("512", "768", "1024")
CHOICES = ("size", "target_size")  # at every drawing
_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")  # of codes' names
_PATCH = 32  # pixels per unit of the size tokens
_MAX_RATIO = 4.0


def chameleon() -> ml_collections.ConfigDict:
  """What all Chameleon-7B fine-tunes share."""
  return ml_collections.ConfigDict(dict(
      trunk=dict(
          d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
          d_ff=11008, vocab_in=65536, vocab_out=8192, norm_eps=1e-5,
          qk_norm=True),
      vq=dict(
          ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, z_channels=256,
          n_codes=8192, code_dim=256, l2_norm=False, attn_levels=(),
          groups=32),
      theta=10_000.0,
      ids=dict(start=0, first_code=4, end_of_row=8803, image=8197,
               end_of_turn=8710, size=8804),
  ))


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Settings of a variant: the side of its square; "" is 768."""
  variant = variant or "768"
  if variant not in VARIANTS:
    raise published.unknown_variant("lumina", variant, VARIANTS)
  config = chameleon()
  config.family = "lumina"
  config.workdir = f"runs/lumina_{variant}"
  config.target_size = int(variant)  # pixels; its square is all sizes' area
  config.size = f"{variant}x{variant}"  # width x height, one of sizes()
  config.tokenizer = "tokenizer.json"
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=4.0, temperature=1.0, top_k=2000, top_p=1.0))
  training_defaults.add(config, prompts=20_000, batch=4 * 32)
  return config


def sizes(target: int) -> list[tuple[int, int]]:
  """(width, height) in pixels of the pictures that the model knows."""
  area = (target // _PATCH) ** 2
  found = []
  width, height = area, 1
  while width > 0:
    if max(width, height) / min(width, height) <= _MAX_RATIO:
      found.append((width * _PATCH, height * _PATCH))
    if (height + 1) * width <= area:
      height += 1
    else:
      width -= 1
  return found


class Chameleon(Published):
  """What reads Chameleon's words and writes its codes."""

  @functools.cached_property
  def text_tokenizer(self):
    """The checkpoint's own, its ids looked at."""
    tokenizer = super().text_tokenizer
    vocabulary, ids = tokenizer.get_vocab(), self.config.ids
    codes = {ids.first_code + int(name[6:-1].translate(_LETTERS)): index
             for name, index in vocabulary.items()
             if re.fullmatch(r"IMGIMG[A-J]+Z", name)}
    names = {"<s>": ids.start, "<racm3:break>": ids.image,
             "<reserved08706>": ids.end_of_turn,
             "<reserved08799>": ids.end_of_row, "<reserved08800>": ids.size}
    wrong = [name for name, i in names.items() if vocabulary.get(name) != i]
    if len(codes) != self.trunk.vocab_out or any(
        expected != index for expected, index in codes.items()):
      wrong.append("image codes")
    if wrong:
      raise UserError(
          f"Expected Chameleon's, got a tokenizer without {wrong[0]} in its "
          "place. Convert again with the checkpoint's own tokenizer.")
    return tokenizer


class Lumina(Chameleon):
  """The family as a pipeline holds it."""

  @functools.cached_property
  def pixels(self) -> tuple[int, int]:
    """(width, height)."""
    return parse_size(self.config.size, self.config.target_size)

  @functools.cached_property
  def grid(self) -> Grid:
    """Two cells per size unit; each row ends with a forced token."""
    width, height = self.pixels
    cell = self.vq.cfg.downsample
    return Grid(height // cell, width // cell, end_of_row=True)

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """Codes, then end-of-row."""
    return chameleon_input_ids(self.config)

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """The instruction with the text; and the opening of an image alone."""
    ids = self.config.ids
    width, height = self.pixels
    words = (f"Generate an image of {width}x{height} according to the "
             f"following prompt:\n{text}")
    opening = (ids.image, ids.size + height // _PATCH,
               ids.size + width // _PATCH)
    prompt = (ids.start, *self.text_ids(words), ids.end_of_turn, *opening)
    return prompt, opening


def parse_size(size: str, target: int) -> tuple[int, int]:
  """(width, height) of a size such as "768x768".

  Raises:
    UserError: when the model of this target does not know the size.
  """
  known = sizes(target)
  names = [f"{w}x{h}" for w, h in known]
  if size not in names:
    raise UserError(
        f"Expected one of the {len(names)} WIDTHxHEIGHT of lumina:{target}, "
        f"such as {target}x{target} or {names[0]}, got size {size!r}. Change "
        "size.")
  return known[names.index(size)]


def chameleon_input_ids(config: ml_collections.ConfigDict) -> np.ndarray:
  """int32 [V + 1]: the joint vocabulary's ids of codes and end-of-row."""
  codes = config.ids.first_code + np.arange(config.trunk.vocab_out)
  return np.append(codes, config.ids.end_of_row).astype(np.int32)


def from_settings(settings: dict, folder: pathlib.Path | None) -> Lumina:
  """The family of a model.json."""
  return Lumina(ml_collections.ConfigDict(settings["config"]), folder)
