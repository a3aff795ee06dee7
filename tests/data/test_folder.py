"""A user's folder of captioned pictures, and how a picture is fitted."""

import json
import pickle
import re

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.data import sources
from ssd_jax.data.folder import FolderSource
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
