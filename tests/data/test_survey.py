"""One reading of all pictures: captions, digests, damage."""

import tracemalloc

import numpy as np
import pytest

from ssd_jax.data import sources, survey
from ssd_jax.data.folder import FolderSource
from ssd_jax.data.pictures import Source, Unreadable
from tests.support.made_pictures import captioned_folder, solid, truncate


def test_all_damaged_pictures_are_named_at_once(tmp_path):
  """Pixels of every split are read before the first step."""
  folder = captioned_folder(tmp_path, 12)
  for name in ("02", "05", "11"):
    truncate(folder / f"{name}.png")
  splits = sources.open_splits(f"folder:{folder}", ("train", "validation"), 8)
  with pytest.raises(Unreadable, match="got 3 images that cannot") as error:
    survey.survey_all(splits)
  assert all(f"{name}.png" in str(error.value) for name in ("02", "05", "11"))
  assert "\n" not in str(error.value)


def test_digests_follow_the_content(tmp_path):
  """A changed pixel and a changed caption are seen, each at its item."""
  folder = captioned_folder(tmp_path, 3)
  look = lambda: survey.survey(FolderSource(str(folder), 8))
  before = look()
  assert before.captions == ("number 0", "number 1", "number 2")
  assert before.items == ((0,), (1,), (2,))
  solid(folder / "01.png", (1, 1, 9))
  (folder / "02.txt").write_text("two")
  after = look()
  assert (before.images == after.images).tolist() == [True, False, True]
  assert (before.digests() == after.digests()).tolist() == [True, True, False]


class Made(Source):
  """Noise, so that no two pictures are equal."""

  def __init__(self, count, pixels=64):
    self.keys, self.pixels = tuple(map(str, range(count))), pixels

  def __getitem__(self, index):
    image = np.full((self.pixels, self.pixels, 3), index % 251, np.uint8)
    return {"image": image, "caption": "a", "tags": ()}


def test_memory_does_not_grow_with_the_pictures():
  """A thousand pictures of 12 kB are never held together."""
  tracemalloc.start()
  try:
    found = survey.survey(Made(1000))
    most = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert len(found.images) == 1000 and most < 3e6  # all of them: 12.3 MB
