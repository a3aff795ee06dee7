"""An output folder of generated images, with a contact sheet."""

import pathlib
import re
import sys

import jax
import numpy as np
from PIL import Image, PngImagePlugin

from ssd_jax.core.outputs import Picture
from ssd_jax.visualization.contact_sheets import captioned, save_picture

_SHEET_IMAGES = 64  # most images of the contact sheet


class Album:
  """Writes images as they finish; few of them stay in memory.

  If several hosts hold all images, each writes its share.

  Attributes:
    sheet: Path of the contact sheet, once closed; None for a single image.
  """

  def __init__(self, folder: pathlib.Path, settings: dict):
    self._folder, self._settings = folder, settings
    self._written: dict[int, tuple[pathlib.Path, str, int]] = {}
    self._first: dict[int, tuple[str, np.ndarray]] = {}
    self.sheet: pathlib.Path | None = None

  def add(self, picture: Picture) -> None:
    """Writes a PNG with its prompt and settings."""
    index, prompt = picture.index, picture.prompt
    path = self._folder / f"{index:04d}_{file_name(prompt)}.png"
    if index % jax.process_count() == jax.process_index():
      facts = {"prompt": prompt, "index": index, "passes": picture.passes}
      save_picture(Image.fromarray(picture.image), path,
                   pnginfo=png_metadata({**facts, **self._settings}))
    self._written[index] = (path, prompt, picture.passes)
    if index < _SHEET_IMAGES:
      self._first[index] = (prompt, picture.image)

  def close(self) -> None:
    """Writes the contact sheet of the first images, if there are several."""
    sheet = self._folder / "contact_sheet.png"
    if len(self._written) == 1:
      sheet.unlink(missing_ok=True)  # from an earlier run
      return
    self.sheet = sheet
    if jax.process_index() == 0:
      prompts, images = zip(
          *(self._first[i] for i in sorted(self._first)), strict=True)
      save_picture(captioned(images, prompts), self.sheet)

  @property
  def paths(self) -> list[pathlib.Path]:
    """Paths of the PNGs, by index."""
    return [self._written[i][0] for i in sorted(self._written)]

  @property
  def prompts(self) -> list[str]:
    """Prompts, by index."""
    return [self._written[i][1] for i in sorted(self._written)]

  @property
  def passes(self) -> list[int]:
    """Passes of each image, by index."""
    return [self._written[i][2] for i in sorted(self._written)]

  @property
  def notes(self) -> list[str]:
    """What the user should know about the folder."""
    notes, count = [], len(self._first)
    if len(self._written) > count:
      notes.append(f"the contact sheet shows the first {count} images")
    others = set(self._folder.glob("[0-9]" * 4 + "_*.png")) - set(self.paths)
    if others:
      notes.append(
          f"{self._folder} also holds {len(others)} images of earlier runs")
    return notes


def png_metadata(facts: dict) -> PngImagePlugin.PngInfo:
  """Returns the facts as text that a PNG carries."""
  metadata = PngImagePlugin.PngInfo()
  for key, value in facts.items():
    text = str(value).encode("utf-8", "backslashreplace")
    metadata.add_itxt(key, text.decode())
  return metadata


def file_name(prompt: str) -> str:
  """Returns a prompt as part of a file name: letters and digits of any script.

  >>> file_name("../a red/heart?")
  'a_red_heart'
  """
  system = sys.getfilesystemencoding()  # which may know few letters
  prompt = prompt.encode(system, "ignore").decode(system)
  return re.sub(r"\W+", "_", prompt).strip("_")[:40] or "prompt"
