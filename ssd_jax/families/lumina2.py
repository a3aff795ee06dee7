"""Lumina-mGPT 2.0 (Xin et al. 2025, arXiv:2507.17801).

A trunk of Chameleon's kind, trained from scratch on a vocabulary of Qwen2.5's
text and MoVQGAN's image tokens of 8 px. Each row ends with a forced token. The
prompt holds the size, as text and as two tokens; the unconditional stream
starts at the begin-of-image token. The published guidance falls from values
above 4 to 4 within a few hundred tokens; here it is constant, which is the same
at 4.
"""

from collections.abc import Mapping
import functools
import json
import pathlib
from typing import Any

import ml_collections
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.families import published, training_defaults
from ssd_jax.families.published import Ids, PromptedByIds

VARIANTS = ("768",)
CHOICES = ("size",)  # may be set in each call
_UNIT = 32  # pixels per unit of the size tokens
_MOST_UNITS = 64
_TURN_END, _SIZE, _ROW_END, _IMAGE = (
    "<reserved08706>", "<reserved{:05d}>", "<reserved08799>", "<racm3:break>")
_FIRST_SIZE = 8800  # number in the name of the size token of 0 units
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the settings of the published size, "768"."""
  variant = variant or "768"
  if variant not in VARIANTS:
    raise published.unknown_variant("lumina2", variant, VARIANTS)
  config = ml_collections.ConfigDict()
  config.family = "lumina2"
  config.workdir = "runs/lumina2"
  config.trunk = ml_collections.ConfigDict(dict(
      d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
      d_ff=11_008, vocab_in=171_385, vocab_out=16_384, norm_eps=1e-5,
      qk_norm=True))
  config.vq = ml_collections.ConfigDict(dict(
      ch=256, ch_mult=(1, 2, 2, 4), num_res_blocks=2, z_channels=4,
      n_codes=16_384, code_dim=4, l2_norm=False, attn_levels=(3,), groups=32,
      spatial=True))
  config.theta = 10_000.0
  config.ids = ml_collections.ConfigDict(dict(
      image=151_665, end_of_row=151_670, first_code=155_000))
  config.size = "768x768"  # width x height
  config.tokenizer = TOKENIZER[0]
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=4.0, temperature=1.0, top_k=4096, top_p=1.0))
  training_defaults.add(config, prompts=20_000, batch=4 * 32)
  return config


class Lumina2(PromptedByIds):
  """The Lumina-mGPT 2.0 family."""

  rounds_pixels = True

  @functools.cached_property
  def units(self) -> tuple[int, int]:
    """Width and height of the image in units of the size tokens."""
    parts = str(self.config.size).split("x")
    sides = [int(p) for p in parts if p.isdecimal() and len(p) < 6]
    if len(sides) != 2 or len(parts) != 2 or any(
        side % _UNIT or not 1 <= side // _UNIT <= _MOST_UNITS
        for side in sides):
      raise UserError(
          "Expected size to be WIDTHxHEIGHT, multiples of "
          f"{_UNIT} up to {_UNIT * _MOST_UNITS}, such as 768x768, got size "
          f"{self.config.size!r}.")
    return sides[0] // _UNIT, sides[1] // _UNIT

  @functools.cached_property
  def grid(self) -> Grid:
    """The grid, with end-of-row tokens."""
    per_unit = _UNIT // self.vq.cfg.downsample
    width, height = self.units
    return Grid(height * per_unit, width * per_unit, end_of_row=True)

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """Rows of the image tokens, then of the end-of-row token."""
    ids = self.config.ids
    image = ids.first_code + np.arange(self.trunk.vocab_out)
    return np.append(image, ids.end_of_row).astype(np.int32)

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the instruction with the text, and the start of an image."""
    width, height = self.units
    words = (f"Generate an image of {_UNIT * width}x{_UNIT * height} according "
             f"to the following prompt:\n{text}")
    size = lambda units: self._id(_SIZE.format(_FIRST_SIZE + units))
    opening = (self.config.ids.image, size(height), size(width))
    prompt = (self._start, *self.text_ids(words), self._id(_TURN_END), *opening)
    return prompt, opening

  @functools.cached_property
  def _start(self) -> int:
    """Id that begins a sequence: that of the end of one, if there is none."""
    if self.folder is None:
      return self.trunk.vocab_in - 1
    file = self.tokenizer_file(TOKENIZER[1])
    try:
      settings = json.loads(file.read_text("utf-8"))
      names = [_name_of(settings, kind) for kind in ("bos_token", "eos_token")]
    except (ValueError, TypeError, AttributeError) as error:
      raise published.damaged_tokenizer(file, error) from error
    return self._id(names[0] or names[1] or "bos_token")

  def _id(self, token: str) -> int:
    if self.folder is None:  # ids that differ, below those of image tokens
      return self.config.ids.image - 1 - sum(token.encode()) % 100
    found = self.text_tokenizer.token_to_id(token)
    if found is None:
      raise UserError(
          f"Expected the tokenizer of Lumina-mGPT 2.0, got one without "
          f"{token!r}. Convert again with the checkpoint's own.")
    return found

  @functools.cached_property
  def text_tokenizer(self):
    """The checkpoint's text tokenizer, with its ids checked."""
    tokenizer, ids = super().text_tokenizer, self.config.ids
    for token, index in ((_IMAGE, ids.image), (_ROW_END, ids.end_of_row)):
      if tokenizer.token_to_id(token) != index:
        raise UserError(
            f"Expected the tokenizer of Lumina-mGPT 2.0, got one without "
            f"{token!r} at id {index}. Convert again with the checkpoint's "
            "own.")
    return tokenizer


def _name_of(settings: Mapping[str, Any], kind: str) -> str | None:
  """Returns a special token in a tokenizer_config.json, None without one."""
  token = settings.get(kind)
  return token["content"] if isinstance(token, Mapping) else token


def from_settings(settings: dict, folder: pathlib.Path | None) -> Lumina2:
  """Returns the family described by a model.json."""
  return Lumina2(ml_collections.ConfigDict(settings["config"]), folder)
