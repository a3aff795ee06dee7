"""The vendored emoji, the split of any source, and the stream over it."""

import collections
import re
import subprocess
import sys

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.data import sources
from ssd_jax.data.pictures import Source
from tests.support.made_pictures import captioned_folder, check_item


def test_emoji_counts():
  """3,372 pictures of 1,852 base emoji are vendored, a tenth held out."""
  assert len(sources.emoji_records()) == 3372
  assert len(sources.emoji_records("all", tones=False)) == 1852
  assert len({e.code for e in sources.emoji_records()}) == 3372
  held = len(sources.EmojiSource("validation"))
  assert held + len(sources.EmojiSource("train")) == 1852
  assert 0.08 < held / 1852 < 0.12


def neutral(label):
  """A label without skin tone and gender."""
  label = re.sub(r"(medium-)?(light|medium|dark) skin tone", "", label.lower())
  for words, instead in (
      ("women|men|people", "people"), ("mrs.|mx|santa", "santa"),
      ("woman|man|person|boy|girl|child|male|female", "person"),
      ("princess|prince", "prince"),
  ):
    label = re.sub(rf"\b({words})(?=\W|$)", instead, label)
  return re.sub(r"[\s,:]+", " ", label).strip()


def test_emoji_split_keeps_variants_together():
  """No tone or gender variant of a training emoji is held out."""
  sides, groups = collections.defaultdict(set), collections.defaultdict(set)
  for emoji in sources.emoji_records():
    sides[neutral(emoji.label)].add(emoji.is_validation)
    groups[emoji.base].add(emoji.group)
  assert [name for name, on in sides.items() if len(on) > 1] == []
  assert all(len(group) == 1 for group in groups.values())
  train, held = (
      {e.group for e in sources.emoji_records(split)}
      for split in ("train", "validation")
  )
  assert not train & held


def test_emoji_assets_are_small_and_whole():
  """Pictures and captions take under 10 MB, with a picture per caption."""
  files = [sources.EMOJI_DIR / n for n in ("images.zip", "captions.json")]
  assert sum(f.stat().st_size for f in files) < 10e6
  names = set(sources._emoji_files())
  assert names == {f"{e.code}.webp" for e in sources.emoji_records()}
  assert (sources.EMOJI_DIR / "LICENSES.txt").is_file()


def test_emoji_items():
  """Items are 128 pixels on white; other sizes are scaled."""
  source = sources.EmojiSource("train")
  for index in (0, 700, len(source) - 1):
    check_item(source[index], 128)
  corners = np.stack([
      source[i]["image"][[0, 0, -1, -1], [0, -1, 0, -1]]
      for i in range(0, len(source), 40)
  ])
  assert np.median(corners) > 250
  check_item(sources.open_source("emoji", "validation", 32)[3], 32)


def test_emoji_variants():
  """An item varies in tone only, itself first, half of the time itself."""
  source = sources.EmojiSource("train")
  index = next(
      i for i, e in enumerate(source.records) if e.label == "waving hand")
  variants = source.variants(index)
  assert [v["caption"] for v in variants][:1] == ["waving hand"]
  assert len(variants) == 6
  assert all(v["caption"].startswith("waving hand") for v in variants)
  rng = np.random.default_rng(0)
  drawn = [source.variant(index, rng)["caption"] for _ in range(120)]
  assert set(drawn) == {v["caption"] for v in variants}
  # Itself: 1/2 + 1/2 * 1/6 = 0.58 of the time; 4 standard deviations are 0.18.
  assert 0.4 < drawn.count("waving hand") / 120 < 0.77


# The split of any source.


class Named(Source):
  """Items that are their keys."""

  def __init__(self, keys):
    self.keys = tuple(keys)

  def __getitem__(self, index):
    return {"caption": self.keys[index]}


def test_hold_out_is_stable():
  """Sides are disjoint, near a tenth, and do not change as files are added."""
  def side(count, split):
    return set(sources.hold_out(Named(map(str, range(count))), split).keys)

  train, held = side(2000, "train"), side(2000, "validation")
  assert not train & held and len(train | held) == 2000
  assert 0.08 < len(held) / 2000 < 0.12
  assert held <= side(3000, "validation") and train <= side(3000, "train")
  assert len(side(2000, "all")) == 2000


def test_hold_out_of_few():
  """Two items are enough for both sides, one is an error."""
  for keys in (("a", "b"), ("b", "c", "d")):
    source = Named(keys)
    parts = [sources.hold_out(source, s) for s in ("train", "validation")]
    assert min(map(len, parts)) >= 1
    assert sorted(parts[0].keys + parts[1].keys) == sorted(keys)
  assert len(sources.hold_out(Named("a"), "all")) == 1
  with pytest.raises(UserError, match="1 image"):
    sources.hold_out(Named("a"), "train")


def test_open_source_of_a_folder(tmp_path):
  """A folder's sides make it up, and are the same when opened again."""
  spec = f"folder:{captioned_folder(tmp_path, 12)}"
  parts = {s: sources.open_source(spec, s, 8) for s in sources.SPLITS}
  both = parts["train"].keys + parts["validation"].keys
  assert sorted(both) == list(parts["all"].keys)
  again = sources.open_source(spec, "train", 8)
  assert again.keys == parts["train"].keys
  check_item(parts["validation"][0], 8)
  key = parts["train"].keys[2]
  assert parts["train"][2]["caption"] == f"number {int(key)}"
  assert len(parts["train"].variants(2)) == 1


@pytest.mark.parametrize("spec, split, pixels, match", [
    ("emojis", "train", 8, "Expected emoji, .*got 'emojis'"),
    ("folder:", "train", 8, "folder:PATH"),
    ("emoji", "test", 8, "split=test"),
    ("emoji", "train", 0, "pixels=0"),
    ("tfds:mnist?caption=label", "train", 8, "option=caption"),
])
def test_open_source_errors(spec, split, pixels, match):
  """A spec that cannot be is one line that says what can."""
  with pytest.raises(UserError, match=match):
    sources.open_source(spec, split, pixels)


def test_tfds_is_imported_where_used():
  """Neither TFDS nor TensorFlow is imported for other sources."""
  code = (
      "import sys; from ssd_jax.data import sources;"
      "sources.open_source('emoji', 'train', 8);"
      "print([m for m in sys.modules if m.startswith('tensorflow')])"
  )
  run = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "[]"


# The stream.
