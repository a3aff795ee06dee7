"""An output folder of image tokens that another model paints."""

import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from ssd_jax.core.outputs import Picture
from ssd_jax.families.glm_image import prior_ids
from ssd_jax.pipeline import painting
from ssd_jax.storage.files import write_json
from ssd_jax.visualization.album import file_name, png_metadata
from ssd_jax.visualization.contact_sheets import save_picture


class TokenFiles:
  """Writes the tokens of each image as .npy and .json; see `Album`.

  The .npy holds int64 [1, 4 R C], as GlmImagePipeline takes `prior_token_ids`;
  the .json the grids as they were generated, the prompt and the settings.

  Attributes:
    sheet: None; there is nothing to see.
    notes: What the user should know about the folder.
  """

  sheet: pathlib.Path | None = None

  def __init__(self, folder: pathlib.Path, settings: dict):
    self._folder, self._settings = folder, settings
    self._written: dict[int, tuple[pathlib.Path, str, int]] = {}
    self._tokens: dict[int, np.ndarray] = {}
    self.notes: list[str] = []

  def add(self, picture: Picture) -> None:
    """Writes both files of an image."""
    index, prompt = picture.index, picture.prompt
    path = self._folder / f"{index:04d}_{file_name(prompt)}.npy"
    if index % jax.process_count() == jax.process_index():
      np.save(path, prior_ids(picture.tokens[None]))
      preview = picture.preview
      write_json(path.with_suffix(".json"), {
          "prompt": prompt, "index": index, "passes": picture.passes,
          **self._settings, "tokens": picture.tokens.tolist(),
          "preview": None if preview is None else preview.tolist()})
    self._written[index] = (path, prompt, picture.passes)
    self._tokens[index] = picture.tokens

  def close(self) -> None:
    """Does nothing: each image was written when it was added."""

  def paint(self, painter: Any, seed: int) -> list[pathlib.Path]:
    """Writes a PNG beside the tokens of each image; returns their paths.

    Args:
      painter: A `diffusers.GlmImagePipeline`; see `painting.paint_grid`.
      seed: Seed of its noise.
    """
    painted = []
    for index, (path, prompt, passes) in sorted(self._written.items()):
      image = painting.paint_grid(
          painter, prompt, self._tokens[index], seed, index)
      painted.append(path.with_suffix(".png"))
      save_picture(Image.fromarray(image), painted[-1], pnginfo=png_metadata({
          "prompt": prompt, "index": index, "passes": passes,
          **self._settings}))
    return painted

  @property
  def paths(self) -> list[pathlib.Path]:
    """Paths of the .npy files, by index."""
    return [self._written[i][0] for i in sorted(self._written)]

  @property
  def prompts(self) -> list[str]:
    """Prompts, by index."""
    return [self._written[i][1] for i in sorted(self._written)]

  @property
  def passes(self) -> list[int]:
    """Passes of each image, by index."""
    return [self._written[i][2] for i in sorted(self._written)]
