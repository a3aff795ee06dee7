"""Lumina-mGPT-7B (Liu et al. 2024, arXiv:2408.02657), a Chameleon fine-tune.

Rows end with a forced token. The prompt contains the size of the image, as text
and as two tokens. The unconditional stream has no text: it starts at the
begin-of-image token, and so do its positions.
"""

import functools
import pathlib
import re

import ml_collections
import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.grid import Grid
from ssd_jax.families import published, training_defaults
from ssd_jax.families.published import Ids, PromptedByIds

VARIANTS = ("512", "768", "1024")
CHOICES = ("size", "target_size")  # may be set in each call
_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")  # in image tokens' names
_PATCH = 32  # pixels per unit of the size tokens
_MAX_RATIO = 4.0
_MOST_PIXELS = 4096  # of target_size


def chameleon() -> ml_collections.ConfigDict:
  """Returns the settings that all Chameleon-7B fine-tunes share."""
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
  """Returns the settings of a variant, the side of its square; "" is 768."""
  variant = variant or "768"
  if variant not in VARIANTS:
    raise published.unknown_variant("lumina", variant, VARIANTS)
  config = chameleon()
  config.family = "lumina"
  config.workdir = f"runs/lumina_{variant}"
  config.target_size = int(variant)  # pixels; its square is the area of sizes
  config.size = f"{variant}x{variant}"  # width x height, one of sizes()
  config.tokenizer = "tokenizer.json"
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=4.0, temperature=1.0, top_k=2000, top_p=1.0))
  training_defaults.add(config, prompts=20_000, batch=4 * 32)
  return config


def sizes(target: int) -> list[tuple[int, int]]:
  """Returns the image sizes that the model supports, (width, height) in pixels.

  Args:
    target: Side of the square whose area bounds all sizes.
  """
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


class Chameleon(PromptedByIds):
  """Base class of families with Chameleon's text tokenizer."""

  @functools.cached_property
  def text_tokenizer(self):
    """The checkpoint's text tokenizer, with its ids checked."""
    tokenizer = super().text_tokenizer
    vocabulary, ids = tokenizer.get_vocab(), self.config.ids
    image = {ids.first_code + int(name[6:-1].translate(_LETTERS)): index
             for name, index in vocabulary.items()
             if re.fullmatch(r"IMGIMG[A-J]+Z", name)}
    names = {"<s>": ids.start, "<racm3:break>": ids.image,
             "<reserved08706>": ids.end_of_turn,
             "<reserved08799>": ids.end_of_row, "<reserved08800>": ids.size}
    wrong = [name for name, i in names.items() if vocabulary.get(name) != i]
    if len(image) != self.trunk.vocab_out or any(
        expected != index for expected, index in image.items()):
      wrong.append("image tokens")
    if wrong:
      raise UserError(
          f"Expected Chameleon's tokenizer, got a tokenizer without {wrong[0]} "
          "at the expected ids. Convert again with the checkpoint's own "
          "tokenizer.")
    return tokenizer


class Lumina(Chameleon):
  """The Lumina-mGPT family."""

  @functools.cached_property
  def pixels(self) -> tuple[int, int]:
    """Width and height of the image in pixels."""
    return parse_size(self.config.size, self.config.target_size)

  @functools.cached_property
  def grid(self) -> Grid:
    """The grid, with two tokens per size unit and end-of-row tokens."""
    width, height = self.pixels
    step = self.vq.cfg.downsample
    return Grid(height // step, width // step, end_of_row=True)

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """Rows of the image tokens, then of the end-of-row token."""
    return chameleon_input_ids(self.config)

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the instruction with the text, and the start of an image."""
    ids = self.config.ids
    width, height = self.pixels
    words = (f"Generate an image of {width}x{height} according to the "
             f"following prompt:\n{text}")
    opening = (ids.image, ids.size + height // _PATCH,
               ids.size + width // _PATCH)
    prompt = (ids.start, *self.text_ids(words), ids.end_of_turn, *opening)
    return prompt, opening


def parse_size(size: str, target: int) -> tuple[int, int]:
  """Parses a size such as "768x768" to (width, height).

  Args:
    size: The size.
    target: Side of the square whose area bounds all sizes.

  Raises:
    UserError: The model does not support the size.
  """
  check(_PATCH <= target <= _MOST_PIXELS, "target_size", target,
        f"{_PATCH} to {_MOST_PIXELS}")
  known = sizes(target)
  names = [f"{w}x{h}" for w, h in known]
  if size not in names:
    raise UserError(
        f"Expected size to be one of the {len(names)} WIDTHxHEIGHT of "
        f"lumina:{target}, such as {target}x{target} or {names[0]}, got size "
        f"{size!r}.")
  return known[names.index(size)]


def chameleon_input_ids(config: ml_collections.ConfigDict) -> np.ndarray:
  """Returns the joint vocabulary's ids of image tokens and end-of-row."""
  image = config.ids.first_code + np.arange(config.trunk.vocab_out)
  return np.append(image, config.ids.end_of_row).astype(np.int32)


def from_settings(settings: dict, folder: pathlib.Path | None) -> Lumina:
  """Returns the family described by a model.json."""
  return Lumina(ml_collections.ConfigDict(settings["config"]), folder)
