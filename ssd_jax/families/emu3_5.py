"""Emu3.5-Image 34B (Cui et al. 2025, arXiv:2510.26583), its image generation.

A Qwen3 trunk with Emu3's tokenizer of text and a vocabulary of 131,072 image
tokens, those of an IBQ tokenizer (Shi et al. 2024, arXiv:2412.02692). Rows end
with a forced token, but for the last one. The unconditional stream is the same
template without the text, with its own positions. The published sampler lets
the model write the header of the size, forces its digits and masks everything
but image tokens; here the header is part of the prompt.
"""

import functools
import pathlib
import re

import ml_collections

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.families import training_defaults
from ssd_jax.families.emu3 import Emu3
from ssd_jax.families.published import Ids

CHOICES = ("ratio",)  # may be set in each call
GRIDS = {  # width:height -> rows, columns of the published sizes
    "4:3": (55, 73), "1:1": (64, 64), "16:9": (47, 85), "9:16": (85, 47),
    "3:2": (52, 78), "2:3": (78, 52), "3:4": (73, 55), "21:9": (41, 97)}
_MOST_SLOTS = 9216
_TASK = "You are a helpful assistant for t2i task. USER: {} ASSISTANT: "
_NO_TEXT = "You are a helpful assistant. USER:  ASSISTANT: "  # two spaces


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the settings of a ratio, see `grid_size`; "" is "4:3"."""
  variant = variant or "4:3"
  try:
    grid_size(variant)
  except UserError as error:
    raise ValueError(str(error)) from error
  config = ml_collections.ConfigDict()
  config.family = "emu3_5"
  config.workdir = "runs/emu3_5"
  config.trunk = ml_collections.ConfigDict(dict(
      d_model=5120, n_layers=64, n_heads=64, n_kv_heads=8, head_dim=128,
      d_ff=25_600, vocab_in=151_854 + 131_072, vocab_out=131_072,
      norm_eps=1e-6, qk_rms=True))
  config.vq = ml_collections.ConfigDict(dict(
      ch=256, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=4, z_channels=256,
      n_codes=131_072, code_dim=256, l2_norm=False, attn_levels=(4,),
      groups=32, dot=True))
  config.theta = 1_000_000.0
  config.ids = ml_collections.ConfigDict(dict(
      specials=151_643, start=151_849, end_of_row=151_846, image=151_851,
      begin_of_image=151_852, begin_of_answer=151_746, first_code=151_854))
  config.ratio = variant  # width:height, or ROWSxCOLUMNS of the grid
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=5.0, temperature=1.0, top_k=5120, top_p=1.0))
  training_defaults.add(config, prompts=5_000, batch=4 * 8)
  return config


def grid_size(ratio: str) -> tuple[int, int]:
  """Returns the rows and columns of a published ratio or of "ROWSxCOLUMNS".

  Raises:
    UserError: The ratio is neither.
  """
  if ratio in GRIDS:
    return GRIDS[ratio]
  found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", ratio)
  sides = (int(found[1]), int(found[2])) if found else (0, 0)
  if not 0 < sides[0] * (sides[1] + 1) <= _MOST_SLOTS:
    raise UserError(
        f"Expected ratio to be one of {', '.join(GRIDS)}, or ROWSxCOLUMNS of "
        f"at most {_MOST_SLOTS} tokens, such as 32x32, got ratio {ratio!r}.")
  return sides


class Emu35(Emu3):
  """The Emu3.5-Image family."""

  @functools.cached_property
  def grid(self) -> Grid:
    """The grid, with end-of-row tokens."""
    return Grid(*grid_size(self.config.ratio), end_of_row=True)

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the task with the text, and without, each with the header."""
    return self._prompt(_TASK.format(text)), self._prompt(_NO_TEXT)

  def _prompt(self, text: str) -> Ids:
    ids, grid = self.config.ids, self.grid
    return (ids.start, *self.text_ids(text), ids.begin_of_answer,
            ids.begin_of_image, *self.text_ids(f"{grid.rows}*{grid.cols}"),
            ids.image)


def from_settings(settings: dict, folder: pathlib.Path | None) -> Emu35:
  """Returns the family described by a model.json."""
  return Emu35(ml_collections.ConfigDict(settings["config"]), folder)
