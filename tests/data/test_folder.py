"""A user's folder of captioned pictures, and how a picture is fitted."""

import json
import os
import pickle
import re

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.data import sources
from ssd_jax.data.folder import FolderSource
from ssd_jax.data.pictures import Unreadable
from tests.support.made_pictures import (
  captioned_folder,
  check_item,
  solid,
  truncate,
)

TABLES = {
    "captions.json": json.dumps({
        "a.png": "a cat", "sub/b.JPG": {"caption": "a dog", "tags": ["pet"]}}),
    "captions.csv": 'file_name,caption,tags\na.png,"a  cat",\n'
                    'sub\\b.JPG,a dog," pet,"\n',
    "captions.tsv": "\ufefffile\ttext\ttags\na.png\ta cat\t\n"
                    "sub/b.JPG\ta dog\tpet\n",
    "metadata.jsonl": '{"file_name": "a.png", "text": "a cat"}\n\n'
                      '{"file_name": "sub/b.JPG", "text": "a dog", '
                      '"tags": ["pet"]}\n',
}
TABLES["metadata.csv"] = TABLES["captions.csv"].replace("caption", "text")
TABLES["captions.jsonl"] = TABLES["metadata.jsonl"]


@pytest.mark.parametrize("table", TABLES)
def test_folder_reads_every_table(tmp_path, table):
  """Each kind of table gives captions and tags, for nested folders too."""
  solid(tmp_path / "a.png", (10, 20, 30))
  solid(tmp_path / "sub" / "b.JPG", format="jpeg")
  solid(tmp_path / ".hidden" / "c.png")
  (tmp_path / table).write_text(TABLES[table], encoding="utf-8")
  source = FolderSource(str(tmp_path), 8)
  assert [source[i]["caption"] for i in range(len(source))] == [
      "a cat", "a dog"]
  assert source[1]["tags"] == ("pet",)
  check_item(source[1], 8)
  assert (source[0]["image"] == (10, 20, 30)).all()
  assert source.variants(0)[0]["caption"] == "a cat"
  assert source.variant(0, np.random.default_rng(0))["caption"] == "a cat"
  assert pickle.loads(pickle.dumps(source))[1]["caption"] == "a dog"


def test_folder_reads_text_files_and_formats(tmp_path):
  """A text file beside a picture is its caption, whatever the format."""
  for suffix in ("png", "jpg", "jpeg", "webp", "bmp", "gif"):
    solid(tmp_path / f"{suffix}.{suffix}")
    (tmp_path / f"{suffix}.txt").write_text(f"in\n{suffix} ")
  source = sources.open_source(f"folder:{tmp_path}", "all", 6)
  assert len(source) == 6
  for i in range(6):
    check_item(source[i], 6)
  assert source[0]["caption"] == "in bmp"


def broken_folder(kind, folder):
  """Spoils a good folder; returns what the error must name."""
  bad = folder / "03.png"
  if kind == "empty":
    for file in folder.iterdir():
      file.unlink()
    return str(folder)
  if kind == "no folder":
    return str(folder / "nowhere")
  if kind == "missing caption":
    bad.with_suffix(".txt").unlink()
  elif kind == "blank caption":
    bad.with_suffix(".txt").write_text(" \n")
  elif kind == "not a picture":
    bad.write_bytes(b"<html>")
  elif kind == "empty file":
    bad.write_bytes(b"")
  else:
    table, text = {
        "bad json": ("captions.json", '{"03.png": '),
        "bad row": ("metadata.jsonl", '{"03.png": "a caption"}'),
        "not rows": ("captions.json", "[3]"),
        "not text": ("captions.json", '{"03.png": ["a", "b"]}'),
        "bad header": ("captions.csv", "03.png,a caption\n"),
        "bad tags": ("metadata.jsonl", '{"file_name": "03.png", '
                     '"caption": "a", "tags": 3}'),
        "no such picture": ("captions.json", '{"33.png": "a"}'),
        "named twice": ("captions.json", '{"03.png": "a", "03.png": "b"}'),
        "too deep": ("captions.json", "[" * 100_000),
    }[kind]
    (folder / table).write_text(text)
    return table
  return str(bad)


@pytest.mark.parametrize("kind", [
    "empty", "no folder", "missing caption", "blank caption", "not a picture",
    "empty file", "bad json", "bad row", "not rows", "not text", "bad header",
    "bad tags", "no such picture", "named twice", "too deep",
])
def test_folder_errors_name_the_file(tmp_path, kind):
  """What is wrong with a folder is one line that names the file."""
  folder = captioned_folder(tmp_path)
  named = broken_folder(kind, folder)
  path = folder / "nowhere" if kind == "no folder" else folder
  with pytest.raises(UserError, match=re.escape(named)) as error:
    FolderSource(str(path), 8)
  assert "Expected " in str(error.value) and "\n" not in str(error.value)


def test_two_captions_are_an_error(tmp_path):
  """Two tables that both caption a picture are named with it."""
  folder = captioned_folder(tmp_path)
  (folder / "captions.json").write_text('{"01.png": "a"}')
  assert FolderSource(str(folder), 8)[1]["caption"] == "a"
  (folder / "captions.csv").write_text("file,caption\n01.png,b\n")
  with pytest.raises(UserError, match="two captions for .*01.png"):
    FolderSource(str(folder), 8)


def test_encoding_is_named(tmp_path):
  """A caption that is not UTF-8 is named."""
  folder = captioned_folder(tmp_path)
  (folder / "02.txt").write_bytes("café".encode("latin-1"))
  with pytest.raises(UserError, match="02.txt, which is not UTF-8"):
    FolderSource(str(folder), 8)


def test_corrupt_pixels_are_named_when_read(tmp_path):
  """A picture whose header is whole is named when its pixels fail."""
  truncate(captioned_folder(tmp_path) / "02.png")
  source = FolderSource(str(tmp_path), 8)
  check_item(source[1], 8)
  with pytest.raises(UserError, match="02.png"):
    source[2]


def captions_of(folder):
  """{key: caption} of a folder."""
  source = FolderSource(str(folder), 8)
  return {key: source.caption(i) for i, key in enumerate(source.keys)}


@pytest.mark.parametrize("spell", [
    "../img/a.png", "./../meta/..//img/a.png", "{folder}/img/a.png",
    "{folder}/meta/../img/a.png", "linked/a.png", "..\\img\\a.png",
    "{folder}/.hard.png"])
def test_names_are_compared_as_files(tmp_path, spell):
  """However a table spells a picture, its caption is found."""
  picture = solid(tmp_path / "img" / "a.png")
  (tmp_path / "meta").mkdir()
  (tmp_path / "meta" / "linked").symlink_to(tmp_path / "img")
  os.link(picture, tmp_path / ".hard.png")
  name = spell.format(folder=tmp_path)
  (tmp_path / "meta" / "captions.json").write_text(json.dumps({name: "a cat"}))
  assert captions_of(tmp_path) == {"img/a": "a cat"}


def test_pictures_elsewhere_belong_to_the_table_that_names_them(tmp_path):
  """Rows for pictures outside of the folder are not lost."""
  own = solid(tmp_path / "own" / "a.png").parent
  outside = solid(tmp_path / "store" / "b.png")
  rows = f"file_name,text\na.png,in\n{outside},out\n"
  (own / "metadata.csv").write_text(rows)
  assert captions_of(own) == {"a": "in", "../store/b": "out"}
  (own / "metadata.csv").write_text(rows + "../store/./b.png,twice\n")
  with pytest.raises(UserError, match="two captions for .*b.png, in .* line 3"):
    FolderSource(str(own), 8)


def test_linked_folders_are_followed_once(tmp_path):
  """Linked folders belong to the data, in circles too."""
  solid(tmp_path / "a" / "1.png").with_suffix(".txt").write_text("one")
  (tmp_path / "a" / "back").symlink_to(tmp_path / "a")
  elsewhere = captioned_folder(tmp_path / "elsewhere", 2)
  (tmp_path / "a" / "more").symlink_to(elsewhere)
  assert captions_of(tmp_path / "a") == {
      "1": "one", "more/00": "number 0", "more/01": "number 1"}


@pytest.mark.parametrize("name, text, kind", [
    ("b.tiff", "b", "tiff"), ("b.TIF", "b", "tiff"), ("b.jfif", "b", "jpeg"),
    ("b.avif", "b", "avif"), ("b", "b", "png"), ("b.2024", "b.2024", "webp"),
    ("b.png.part", "b.png.part", "png")])
def test_any_suffix_of_a_picture_is_one(tmp_path, name, text, kind):
  """Pictures are known by their suffix, or by their first bytes."""
  captioned_folder(tmp_path, 1)
  solid(tmp_path / name, format=kind)
  with pytest.raises(UserError, match=f"no caption for .*{name}"):
    FolderSource(str(tmp_path), 8)
  (tmp_path / f"{text}.txt").write_text("another")
  assert captions_of(tmp_path) == {"00": "number 0", text: "another"}
  check_item(FolderSource(str(tmp_path), 8)[1], 8)


def test_what_is_not_used_is_noted(tmp_path):
  """A hidden picture, a text without its picture and others: one note."""
  captioned_folder(tmp_path, 1)
  solid(tmp_path / ".b.png")
  (tmp_path / "c.txt").write_text("of a picture that is gone")
  (tmp_path / "film.mp4").write_bytes(b"\0\0\0 ftypisom")
  (tmp_path / "._00.png").write_bytes(b"\0\5\x16\7")  # macOS
  (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
  splits = sources.open_splits(f"folder:{tmp_path}", ("all",), 8)
  (note,) = splits["all"].notes
  assert note.endswith(": .b.png, c.txt, film.mp4")


@pytest.mark.parametrize("table, text, said", [
    ("captions.csv", "file_name,caption\n00.png,a red fox, in snow\n",
     "got 3 in .*captions.csv line 2, the last of them ' in snow'"),
    ("captions.csv", 'file_name,caption\n00.png,"a\n', "line 2 .*quotation"),
    ("captions.csv", 'file_name,caption\n00.png,"a" b\n', "line 2 .*quotation"),
    ("captions.csv", "file_name,caption,caption\n00.png,a,b\n",
     "'caption' occurs twice"),
    ("captions.tsv", "file_name\tcaption\n00.png\ta\tb\n", "line 2"),
    ("captions.json", '{"00.png": "\\ud83d"}', "surrogate pair in .* entry 1"),
    ("metadata.jsonl", '\n{"file_name": ', "metadata.jsonl line 2"),
    ("captions.json", '{"a\\u0000.png": "a"}', "does not exist"),
    ("metadata.parquet", "PAR1", "metadata.parquet, which is not read"),
])
def test_rows_are_used_or_named(tmp_path, table, text, said):
  """A row that does not fit its header ends in one line with file and row."""
  captioned_folder(tmp_path, 1)
  (tmp_path / table).write_text(text)
  with pytest.raises(UserError, match=said) as error:
    FolderSource(str(tmp_path), 8)
  assert "\n" not in str(error.value)


def test_all_damaged_headers_are_named(tmp_path):
  """One run shows every picture that cannot be opened, and broken links."""
  folder = captioned_folder(tmp_path, 6)
  (folder / "01.png").write_bytes(b"")
  (folder / "03.png").write_bytes(b"<html>")
  (folder / "05.png").write_text("version https://git-lfs.github.com/spec/v1")
  (folder / "04.png").unlink()
  (folder / "04.png").symlink_to("nowhere.png")
  with pytest.raises(Unreadable, match="got 4 images") as error:
    FolderSource(str(folder), 8)
  assert "05.png (a pointer of Git LFS: run git lfs pull" in str(error.value)
  assert [os.path.basename(name) for name in error.value.reasons] == [
      "01.png", "03.png", "04.png", "05.png"]


def test_a_name_that_is_no_utf8_is_a_key(tmp_path):
  """Splits and digests take any name that a file system does."""
  captioned_folder(tmp_path, 3)
  try:
    solid(tmp_path / os.fsdecode(b"\xff.png"))
  except OSError:
    pytest.skip("a file system of UTF-8 names")
  (tmp_path / os.fsdecode(b"\xff.txt")).write_text("bytes")
  splits = sources.open_splits(
      f"folder:{tmp_path}", ("train", "validation"), 8)
  assert sum(map(len, splits.values())) == 4


def test_a_row_without_a_name_is_said_to_have_none(tmp_path):
  """Not that its folder does not exist."""
  solid(tmp_path / "a.png")
  (tmp_path / "captions.csv").write_text("file,caption\na.png,x\n,\n")
  with pytest.raises(UserError, match="line 3 without a file name"):
    FolderSource(str(tmp_path), 8)
