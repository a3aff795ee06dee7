"""The interface of captioned image sources, and the fitting of images."""

import abc
import hashlib
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ssd_jax.core.config import UserError
from ssd_jax.storage import image_files

VALIDATION_SHARE = 0.1


class Unreadable(UserError):
  """Images that cannot be read.

  Attributes:
    reasons: What is wrong with each image, by its name.
  """

  def __init__(
      self, reasons: dict[str, str], advice: str = "Replace or remove"
  ):
    self.reasons = reasons
    named = "; ".join(f"{name} ({why})" for name, why in reasons.items())
    what = "an image" if len(reasons) == 1 else f"{len(reasons)} images"
    super().__init__(
        f"Expected images that can be read, got {what} that cannot be read: "
        f"{named}. {advice} {'it' if len(reasons) == 1 else 'them'}.")


class Source(abc.ABC):
  """Captioned images with random access.

  A source has `__len__` and `__getitem__`, which returns `{"image": uint8
  [P, P, 3], "caption": str, "tags": tuple[str, ...]}`. It is picklable and
  safe to read from several threads.

  Attributes:
    keys: A name per item, independent of the other items; decides its split.
    notes: What the user should know about the source.
  """

  keys: tuple[str, ...]
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.keys)

  @abc.abstractmethod
  def __getitem__(self, index: int) -> dict: ...

  def caption(self, index: int) -> str:
    """Returns the caption of item `index`."""
    return self[index]["caption"]

  def variants(self, index: int) -> list[dict]:
    """Returns all variants of item `index`, the item itself first."""
    return [self[index]]

  def variant(self, index: int, rng: np.random.Generator) -> dict:
    """Returns a variant of item `index`, sampled with `rng`."""
    del rng  # there is only one variant
    return self[index]


def hash_fraction(key: str) -> float:
  """Returns a number in [0, 1) that depends on `key` alone, on any machine."""
  # A file's name may be no UTF-8.
  digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
  return int.from_bytes(digest[:4], "big") / 2**32


def to_square(picture: Image.Image, pixels: int) -> np.ndarray:
  """Returns an image as `to_size` does, uint8 [pixels, pixels, 3]."""
  return to_size(picture, pixels, pixels)


def to_size(picture: Image.Image, width: int, height: int) -> np.ndarray:
  """Returns an image upright, on white, scaled and centre-cropped.

  Returns:
    uint8 [height, width, 3].
  """
  return _fitted(image_files.upright(picture), width, height)


def _fitted(picture: Image.Image, width: int, height: int) -> np.ndarray:
  return np.asarray(ImageOps.fit(
      picture, (width, height), Image.Resampling.LANCZOS))


def read(
    file: str | BinaryIO, name: str, width: int, height: int
) -> np.ndarray:
  """Reads an image as `to_size` returns it.

  Args:
    file: Its path, or the file.
    name: What the user calls it.
    width: Width in pixels.
    height: Height in pixels.

  Raises:
    UserError: if it cannot be read.
  """
  return _fitted(image_files.read(file, name), width, height)
