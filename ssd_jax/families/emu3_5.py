"""Emu3.5-Image 34B (Cui et al. 2025, arXiv:2510.26583), its image generation.

A Qwen3 trunk with Emu3's tokenizer of text and a vocabulary of 131,072 image
tokens, those of an IBQ tokenizer (Shi et al. 2024, arXiv:2412.02692). Rows end
with a forced token, but for the last one. The unconditional stream is the same
template without the text, with its own positions. The published sampler lets
the model write the header of the size, forces its digits and masks everything
but image tokens; here the header is part of the prompt.

Prompts may contain images. They are resized to an area, and their tokens, with
the header of their size, precede the text; the unconditional stream keeps them.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
import re
from typing import Any, ClassVar

import ml_collections
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Prompt
from ssd_jax.families import training_defaults
from ssd_jax.families.emu3 import Emu3
from ssd_jax.families.published import Ids

CHOICES = ("ratio",)  # may be set in each call
GRIDS = {  # width:height -> rows, columns of the published sizes
    "4:3": (55, 73), "1:1": (64, 64), "16:9": (47, 85), "9:16": (85, 47),
    "3:2": (52, 78), "2:3": (78, 52), "3:4": (73, 55), "21:9": (41, 97)}
_MOST_SLOTS = 9216
_MOST_IMAGES = 3  # in a prompt
_MOST_RATIO = 8  # of an image's sides
_TEXT_TASK = "You are a helpful assistant for t2i task. USER: "
_IMAGE_TASK = "You are a helpful assistant for x2i task. USER: "
_NO_TASK = "You are a helpful assistant. USER: "
_END = " ASSISTANT: "  # without a text two spaces meet


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
      begin_of_image=151_852, end_of_image=151_853, begin_of_answer=151_746,
      first_code=151_854))
  config.source_area = 1024 * 1024  # pixels of an image in a prompt
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

  # A text as of other families, and images of at most 1024 x 1024 pixels.
  longest_prompt: ClassVar[int] = (1 + 13) * 1024

  @functools.cached_property
  def grid(self) -> Grid:
    """The grid, with end-of-row tokens."""
    return Grid(*grid_size(self.config.ratio), end_of_row=True)

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the task with the text, and without, each with the header."""
    return (self.prompt(self.text_ids(_TEXT_TASK + text + _END)),
            self.prompt(self.text_ids(_NO_TASK + _END)))

  def image_prompts(self) -> "ImageTask":
    """Returns how prompts with images are read."""
    return ImageTask(self)

  def prompt(self, task: Sequence[int]) -> Ids:
    """Returns the ids of a task with the header of the image to generate."""
    ids, grid = self.config.ids, self.grid
    return (ids.start, *task, ids.begin_of_answer,
            *self.header(grid.rows, grid.cols))

  def header(self, rows: int, cols: int) -> Ids:
    """Returns the ids with which an image of a size begins."""
    ids = self.config.ids
    return ids.begin_of_image, *self.text_ids(f"{rows}*{cols}"), ids.image


@dataclasses.dataclass(frozen=True)
class ImageTask:
  """Prompts of the x2i task: images, then a text.

  Attributes:
    family: The family, with the size of the image to generate.
    most: Largest number of images in a prompt.
  """

  family: Emu35
  most: int = _MOST_IMAGES

  def size(self, width: int, height: int) -> tuple[int, int]:
    """Returns the (width, height) that an image is resized to, in pixels.

    They are multiples of a token's pixels, their product about `source_area`,
    rounded as the authors round them.

    Raises:
      UserError: One side is too many times the other.
    """
    if max(width, height) > _MOST_RATIO * min(width, height):
      raise UserError(
          f"Expected images with sides of a ratio of at most {_MOST_RATIO}:1, "
          f"got an image of {width}x{height} pixels. Crop it.")
    ratio, cell = width / height, self.family.vq.cfg.downsample
    new_height = int((self.family.config.source_area / ratio)**0.5)
    new_width = int(new_height * ratio)
    nearest = lambda side: max((side + cell // 2) // cell, 1) * cell
    return nearest(new_width), nearest(new_height)

  def output_choices(self, width: int, height: int) -> dict[str, Any]:
    """Returns the ratio with which generated images have such a size."""
    cell = self.family.vq.cfg.downsample
    return {"ratio": f"{height // cell}x{width // cell}"}

  def encode_prompts(
      self, prompts: Sequence[str], guided: bool, images: Sequence[np.ndarray]
  ) -> tuple[Prompt, list[str]]:
    """Encodes texts and images as inputs of the trunk.

    Args:
      prompts: One text per image to generate.
      guided: Whether to append unconditional rows.
      images: Token grids of the images in each prompt, int32 [R, C] each.

    Returns:
      The encoded prompts, and notes for the user.

    Raises:
      UserError: A prompt is too long.
    """
    family = self.family
    given = [token for grid in images for token in self._image(grid)]
    ids_of = lambda task, end: family.prompt(
        [*family.text_ids(task), *given, *family.text_ids(end)])
    without = ids_of(_NO_TASK, _END)
    return family.padded(
        [(ids_of(_IMAGE_TASK, text + _END), without) for text in prompts],
        guided)

  def _image(self, grid_RC: np.ndarray) -> list[int]:
    """Returns the ids of an image: its header, rows with ends between, end."""
    ids, (rows, cols) = self.family.config.ids, grid_RC.shape
    table = np.full((rows, cols + 1), ids.end_of_row)
    table[:, :-1] = ids.first_code + grid_RC
    return [*self.family.header(rows, cols), *table.ravel()[:-1].tolist(),
            ids.end_of_image]


def from_settings(settings: dict, folder: pathlib.Path | None) -> Emu35:
  """Returns the family described by a model.json."""
  return Emu35(ml_collections.ConfigDict(settings["config"]), folder)
