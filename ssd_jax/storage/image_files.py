"""Image files: opened, upright, on white, in RGB."""

import os
import struct
from typing import BinaryIO
import warnings

import numpy as np
from PIL import Image, ImageOps

from ssd_jax.core.config import UserError

# What Pillow raises for a file that is no image that can be read.
FAILURES = (OSError, SyntaxError, ValueError, EOFError, struct.error,
            Image.DecompressionBombError, Image.DecompressionBombWarning)


def upright(picture: Image.Image) -> Image.Image:
  """Returns an image in RGB, turned as its camera was held, on white."""
  picture = ImageOps.exif_transpose(picture)
  if picture.mode.startswith("I"):  # convert() would clip 16 bits
    grey = np.clip(np.asarray(picture, np.float32) / 257, 0, 255)
    picture = Image.fromarray(grey.round().astype(np.uint8))
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)
  return picture.convert("RGB")


def read(file: str | os.PathLike | BinaryIO, name: str) -> Image.Image:
  """Reads an image as `upright` returns it.

  Args:
    file: Its path, or the file.
    name: What the user calls it.

  Raises:
    UserError: if it cannot be read.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      return upright(Image.open(file))
  except FAILURES as error:
    named = f" {file}" if isinstance(file, (str, os.PathLike)) else ""
    why = getattr(error, "strerror", None) or "no image that Pillow knows"
    raise UserError(f"Expected an image that can be read, got {name}{named} "
                    f"({why}).") from error
