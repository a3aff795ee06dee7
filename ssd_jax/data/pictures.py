"""What every source of captioned pictures is, and how a picture is fitted."""

import hashlib

import numpy as np
from PIL import Image, ImageOps

VALIDATION_SHARE = 0.1


class Source:
  """Captioned pictures with random access.

  A source has `__len__` and `__getitem__`, which returns `{"image": uint8
  [P, P, 3], "caption": str, "tags": tuple[str, ...]}`. It is picklable and
  safe to read from several threads.

  Attributes:
    keys: A name per item that does not depend on the other items; what the
      split goes by.
  """

  keys: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.keys)

  def __getitem__(self, index: int) -> dict:
    raise NotImplementedError

  def variants(self, index: int) -> list[dict]:
    """All pictures that item `index` may be shown as, itself first."""
    return [self[index]]

  def variant(self, index: int, rng: np.random.Generator) -> dict:
    """Item `index` as one of its variants, drawn by `rng`."""
    del rng  # one variant leaves nothing to draw
    return self[index]


def hash_fraction(key: str) -> float:
  """A number in [0, 1) that depends on `key` alone, on any machine."""
  digest = hashlib.sha256(key.encode()).digest()
  return int.from_bytes(digest[:4], "big") / 2**32


def to_square(picture: Image.Image, pixels: int) -> np.ndarray:
  """uint8 [pixels, pixels, 3]: upright, on white, scaled and centre-cropped."""
  picture = ImageOps.exif_transpose(picture)
  if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
    grey = np.clip(np.asarray(picture, np.float32) / 257, 0, 255)
    picture = Image.fromarray(grey.round().astype(np.uint8))
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)
  picture = picture.convert("RGB")
  size = (pixels, pixels)
  return np.asarray(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))
