"""How a picture of any format becomes a square of RGB pixels."""

import io

import numpy as np
from PIL import Image

from ssd_jax.data.pictures import to_square


def test_transparency_becomes_white():
  """What is transparent is shown on white, in every way a file can say so."""
  half = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
  assert (to_square(half, 4) == 255).all()
  grey = Image.new("LA", (4, 4), (0, 0))
  assert (to_square(grey, 4) == 255).all()
  palette = Image.new("P", (4, 4), 0)
  palette.putpalette([9, 9, 9] * 256)
  palette.info["transparency"] = 0
  assert (to_square(palette, 4) == 255).all()
  assert (to_square(Image.new("RGBA", (4, 4), (0, 0, 0, 51)), 4) == 204).all()


def test_centre_crop_and_orientation():
  """The short side fits, the middle is kept, and a camera's turn is undone."""
  pixels = np.zeros((8, 24, 3), np.uint8)
  pixels[:, 8:16] = 255
  assert (to_square(Image.fromarray(pixels), 8) == 255).all()
  assert to_square(Image.fromarray(pixels), 4).min() > 200
  turned = Image.new("RGB", (8, 8))
  turned.paste((255, 255, 255), (0, 0, 8, 4))  # white above
  turned.getexif()[0x0112] = 3  # upside down
  blob = io.BytesIO()
  turned.save(blob, "jpeg", exif=turned.getexif(), quality=100)
  image = to_square(Image.open(blob), 8)
  assert image[:3].max() < 60 and image[5:].min() > 200


def test_sixteen_bits_are_scaled():
  """A 16-bit grey picture keeps its tones."""
  grey = Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))
  assert (to_square(grey, 4) == 100).all()
