"""Images and folders that the tests of the sources make."""

import numpy as np
from PIL import Image


def solid(path, colour=(200, 30, 40), size=(12, 9), **options):
  """Writes an image of one colour."""
  path.parent.mkdir(parents=True, exist_ok=True)
  mode = "RGB" if len(colour) == 3 else "RGBA"
  Image.new(mode, size, colour).save(path, **options)
  return path


def captioned_folder(folder, count=6):
  """A folder of `count` images, each with a text file."""
  for i in range(count):
    solid(folder / f"{i:02}.png", (i, i, i)).with_suffix(".txt").write_text(
        f"number {i}\n")
  return folder


def truncate(path):
  """Cuts an image off in the middle of its pixels."""
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  Image.fromarray(noise).save(path)
  path.write_bytes(path.read_bytes()[:1000])


def check_item(item, pixels):
  """The contract of every source's items."""
  assert set(item) == {"image", "caption", "tags"}
  assert item["image"].shape == (pixels, pixels, 3)
  assert item["image"].dtype == np.uint8
  assert isinstance(item["caption"], str) and item["caption"]
  assert all(isinstance(tag, str) for tag in item["tags"])
  assert isinstance(item["tags"], tuple)
