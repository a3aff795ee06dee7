"""An output folder of image tokens that another model paints."""

import pathlib

import jax
import numpy as np

from ssd_jax.core.outputs import Picture
from ssd_jax.families.glm_image import prior_ids
from ssd_jax.storage.files import write_json
from ssd_jax.visualization.album import file_name


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

  def close(self) -> None:
    """Does nothing: each image was written when it was added."""

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
