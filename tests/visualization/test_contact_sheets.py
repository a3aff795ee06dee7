"""Contact sheets hold every image, and images are written whole or not."""

import numpy as np
from PIL import Image
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.visualization import contact_sheets


def test_contact_sheet_places_pictures_by_row_and_column():
  """Every picture is on the sheet once, in its row and column."""
  colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (9, 9, 9)]]
  images = [[np.full((64, 64, 3), c, np.uint8) for c in row] for row in colours]
  captions = ["a long caption of many words " * 9, ""]
  sheet = np.asarray(
      contact_sheets.contact_sheet(images, captions, ["ar", "ssd:rounds=1"]))
  places = {}
  for row in colours:
    for colour in row:
      rows, cols = np.where((sheet == colour).all(-1))
      assert len(rows) >= 64 * 64
      places[colour] = rows.mean(), cols.mean()
  (a, b), (c, d) = ([places[x] for x in row] for row in colours)
  assert a[0] == b[0] < c[0] == d[0] and a[1] == c[1] < b[1] == d[1]


def test_large_pictures_are_shrunk():
  """A sheet of large pictures stays of a size one can look at."""
  images = [[np.zeros((512, 256, 3), np.uint8)]]
  sheet = contact_sheets.contact_sheet(
    images, ["x" * 100], ["y" * 100], most=100
  )
  assert sheet.height < 160 and sheet.width < 240


def test_a_sheet_shows_the_prompts():
  """Three pictures in two rows, each whole, with room for its caption."""
  images = [np.full((40, 60, 3), i, np.uint8) for i in range(3)]
  sheet = np.asarray(
    contact_sheets.captioned(images, ["a", "b c", "long " * 90])
  )
  assert sheet.shape[0] > 2 * (40 + 16) and sheet.shape[1] > 2 * 60
  assert all((sheet == i).all(-1).sum() >= 40 * 60 for i in range(3))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
  """What cannot be written ends in one line and leaves nothing behind."""
  def fail(self, path, *args, **kwargs):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Image.Image, "save", fail)
  with pytest.raises(UserError, match="No space left"):
    contact_sheets.save_picture(Image.new("RGB", (4, 4)), tmp_path / "x.png")
  assert not list(tmp_path.iterdir())
