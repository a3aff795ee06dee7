"""Images in prompts: read, counted and resized before weights are needed."""

from collections.abc import Sequence
import os
from typing import Any

import numpy as np
from PIL import Image

from ssd_jax.core.config import UserError
from ssd_jax.core.protocols import Family
from ssd_jax.storage import image_files

Given = str | os.PathLike | Image.Image | np.ndarray


def resized(family: Family, images: Sequence[Given]) -> list[np.ndarray]:
  """Returns images as a family reads them, uint8 [H, W, 3] each.

  Args:
    family: The family.
    images: Files, images of Pillow, or arrays uint8 [H, W, 3].

  Raises:
    UserError: if the family reads none or fewer, or an image cannot be read or
      its sides differ too much.
  """
  size = family.image_prompts().size
  return [np.asarray(x.resize(size(*x.size), Image.Resampling.BICUBIC))
          for x in _opened(family, images)]


def output_choices(family: Family, images: Sequence[Given]) -> dict[str, Any]:
  """Returns settings with which the output has the size of a single image.

  Args:
    family: The family.
    images: As for `resized`; several, or none, choose nothing.

  Raises:
    UserError: as for `resized`.
  """
  if not count(images):
    return {}
  reader = family.image_prompts()
  sizes = [reader.size(*x.size) for x in _opened(family, images)]
  return reader.output_choices(*sizes[0]) if len(sizes) == 1 else {}


def count(images: Sequence[Given]) -> int:
  """Returns the number of images.

  Raises:
    UserError: if they are no list.
  """
  if isinstance(images, Given) or not isinstance(images, Sequence):
    raise UserError(f"Expected a list of images, got {type(images).__name__} "
                    "as images. Put it into brackets.")
  return len(images)


def _opened(family: Family, images: Sequence[Given]) -> list[Image.Image]:
  most = family.image_prompts().most
  if count(images) > most:
    raise UserError(f"Expected at most {most} images in a prompt of "
                    f"{family.name}, got {len(images)}. Leave some out.")
  return list(map(_open, images))


def _open(image: Given) -> Image.Image:
  if isinstance(image, Image.Image):
    return image_files.upright(image)
  if isinstance(image, (str, os.PathLike)):
    return image_files.read(image, "the file")
  array = np.asarray(image)
  if array.dtype != np.uint8 or array.ndim != 3 or (
      array.shape[2] != 3 or not array.size):
    raise UserError(
        "Expected a file, an image of Pillow or uint8 [H, W, 3], got an image "
        f"of shape {array.shape} and kind {array.dtype}.")
  return Image.fromarray(array)
