"""What a run was made from is kept, and a change is one line."""

import json
import re

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.data import survey
from ssd_jax.data.folder import FolderSource
from ssd_jax.training import run_record
from ssd_jax.training.run_record import Listing
from tests.support.made_pictures import captioned_folder, solid

SETTINGS = {"data": "folder:a", "ar": {"loop": {"steps": 3, "batch": 2}}}


def start(run, listing, settings=SETTINGS, parts=None):
  run_record.begin(run, settings, parts or {}, {"train": listing})
  (run / "checkpoints").mkdir(exist_ok=True)


def pictures(folder):
  return Listing.of_images(survey.survey(FolderSource(str(folder), 8)))


def grow(folder):
  solid(folder / "new.png").with_suffix(".txt").write_text("new")


@pytest.mark.parametrize("change, said", [
    (lambda f: (f / "02.txt").write_text("other"), "another caption for '02'"),
    (lambda f: solid(f / "01.png", (9, 9, 9)), "another image for '01'"),
    (grow, "the new image 'new'"),
    (lambda f: [f.joinpath(f"0{i}.png").unlink() for i in (1, 2)],
     "2 images fewer"),
    (lambda f: (f / "captions.json").write_text(
        '{"00.png": "x", "01.png": "y"}'),
     "another caption for '00' and 1 more"),
])
def test_a_change_of_the_data_is_named(tmp_path, change, said):
  """A run whose vocabulary was renumbered is refused."""
  folder = captioned_folder(tmp_path / "data", 4)
  start(tmp_path / "run", pictures(folder))
  start(tmp_path / "run", pictures(folder))  # goes on
  change(folder)
  for _ in range(2):
    with pytest.raises(UserError, match=f"got {re.escape(said)} for the run"):
      start(tmp_path / "run", pictures(folder))
    (tmp_path / "run" / "settings.json").unlink(missing_ok=True)


def test_moved_data_are_the_same_data(tmp_path):
  """Content counts, not the folder's name; in old runs the name does."""
  listing = Listing.of_texts(["a", "b", "a"])
  moved = SETTINGS | {"data": "folder:b"}
  start(tmp_path / "run", listing)
  start(tmp_path / "run", listing, moved)
  (tmp_path / "run" / "data.npz").unlink()  # as before there was one
  with pytest.raises(UserError, match="Expected data=folder:b, with which"):
    start(tmp_path / "run", listing)
  start(tmp_path / "run", listing, moved)
  with pytest.raises(UserError, match="got the new caption 'c', 1 caption few"):
    start(tmp_path / "run", Listing.of_texts(["a", "b", "c"]), moved)
  with pytest.raises(UserError, match="got another order of the captions"):
    start(tmp_path / "run", Listing.of_texts(["b", "a", "a"]), moved)


def test_what_moves_between_splits_is_no_loss(tmp_path):
  """A new image that moves another one: both are named, nothing is fewer."""
  split = lambda train, other: {
      "train": Listing.of_texts(train), "validation": Listing.of_texts(other)}
  run = tmp_path / "run"
  run_record.begin(run, SETTINGS, {}, split(["a", "b"], ["c"]))
  (run / "checkpoints").mkdir()
  with pytest.raises(UserError, match=re.escape(
      "got the new caption 'd', another split for 'b' for the run")):
    run_record.begin(run, SETTINGS, {}, split(["a"], ["b", "c", "d"]))
  with pytest.raises(UserError, match="got 1 caption fewer for the run"):
    run_record.begin(run, SETTINGS, {}, split(["a", "b"], []))


def test_settings_and_parts_belong_to_the_run(tmp_path):
  """Steps may change; a batch, a trunk or a text tokenizer may not."""
  listing, run = Listing.of_texts(["a"]), tmp_path / "run"
  start(run, listing, parts={"trunk": "1"})
  start(run, listing, {**SETTINGS, "ar": {"loop": {"steps": 9, "batch": 2}}},
        {"trunk": "1"})
  with pytest.raises(UserError, match="got another trunk for the run"):
    start(run, listing, parts={"trunk": "2"})
  with pytest.raises(UserError, match="ar.loop.batch=2, with which"):
    start(run, listing, {**SETTINGS, "ar": {"loop": {"batch": 4}}},
          {"trunk": "1"})
  old = json.loads((run / "settings.json").read_text())
  del old["parts"]  # a run of before
  (run / "settings.json").write_text(json.dumps(old))
  start(run, listing, parts={"trunk": "3"})


def test_a_setting_that_came_since_is_taken_over(tmp_path):
  """Runs begun before it existed go on, and hold to it from then on."""
  listing, run = Listing.of_texts(["a"]), tmp_path / "run"
  start(run, listing)
  newer = {**SETTINGS, "ar": {**SETTINGS["ar"], "decoder": "exact"}}
  start(run, listing, newer)
  with pytest.raises(UserError, match="Expected ar.decoder=exact, with which"):
    start(run, listing, SETTINGS)


def test_a_damaged_record_is_one_line(tmp_path):
  """Cut, flipped or foreign, nothing is compared with it."""
  run, listing = tmp_path / "run", Listing.of_texts(["a"])
  start(run, listing)
  whole = (run / "data.npz").read_bytes()
  at = whole.index(np.uint64(listing.arrays()["names"][0]).tobytes())
  for damaged in (b"", whole[:50], whole[:at] + b"\0" + whole[at + 1:]):
    (run / "data.npz").write_bytes(damaged)
    with pytest.raises(UserError, match="damaged .*data.npz"):
      start(run, listing)
  (run / "data.npz").write_bytes(whole)
  for text in ("[]", "3", "{", ""):
    (run / "settings.json").write_text(text)
    with pytest.raises(UserError, match="settings.json"):
      start(run, listing)
