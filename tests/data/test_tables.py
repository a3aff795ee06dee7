"""Tables of texts: any file is read whole, or refused in one line."""

import os

from hypothesis import HealthCheck, given, settings, strategies as st
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.data import folder, tables
from ssd_jax.evaluation import prompt_files
from tests.support.made_pictures import solid

_HEADERS = {"csv": "file_name,caption\na.png,", "tsv": "file\ttext\na.png\t",
            "json": '{"a.png": ', "jsonl": '{"file_name": "a.png", "text": '}
_SCRAPS = st.lists(st.one_of(
    st.text(max_size=8), st.sampled_from([
        ",", "\t", "\n", "\r\n", '"', "{", "}", "[", "]", ":", "null", "1e999",
        '"a.png"', '"caption"', "prompt", "../", "\0", "\\ud800", "[" * 2000])),
    max_size=12).map("".join)


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=_SCRAPS, kind=st.sampled_from(sorted(_HEADERS)),
       begun=st.booleans())
def test_any_text_is_a_table_or_one_line(tmp_path, text, kind, begun):
  """No traceback, and no caption of half characters."""
  table = tmp_path / f"captions.{kind}"
  solid(tmp_path / "a.png")
  table.write_text(_HEADERS[kind] * begun + text, "utf-8", newline="")
  for read in (folder.read_table, prompt_files.read_prompts):
    try:
      for row in read(table):
        texts = [row.prompt] if read is not folder.read_table else [
            row[1].text, *row[1].tags]
        "".join(texts).encode()
    except UserError as error:
      assert "Expected " in str(error) and "\n" not in str(error)


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blob=st.binary(max_size=60), kind=st.sampled_from(sorted(_HEADERS)))
def test_any_bytes_are_a_table_or_one_line(tmp_path, blob, kind):
  """Bytes that are no UTF-8 are said to be none."""
  table = tmp_path / f"metadata.{kind}"
  table.write_bytes(_HEADERS[kind].encode() + blob)
  try:
    tables.read(table)
  except UserError as error:
    assert str(table) in str(error) and "\n" not in str(error)


def test_quoted_fields_are_whole(tmp_path):
  """Commas, quotes and line breaks within quotes are part of the text."""
  table = tmp_path / "captions.csv"
  table.write_text('A,b\n"x, ""y""\nz",1,,\n\nu,2\n')
  rows = tables.read(table)
  assert [row.values for row in rows] == [
      {"a": 'x, "y"\nz', "b": "1"}, {"a": "u", "b": "2"}]
  assert [row.where for row in rows] == [f"{table} line 3", f"{table} line 5"]


@pytest.mark.parametrize("text, named", [
    ("file,caption,tags\na.png,a red fox, in snow\n", "' in snow'"),
    (",file,caption,\n0,a.png,x,lost text\n", "'lost text'"),
    ("prompt,id\na red fox, in snow\n", "' in snow'"),
])
def test_a_cut_text_that_fits_the_columns_is_named(tmp_path, text, named):
  """Another column, with or without a name, does not swallow a tail."""
  file = tmp_path / "captions.csv"
  file.write_text(text)
  with pytest.raises(UserError, match=f"{named}.*line 2"):
    tables.read(file, ("prompt", "caption"))


def test_spaces_behind_all_commas_and_an_index_are_read(tmp_path):
  """A style and what pandas writes; nothing of the text is lost."""
  file = tmp_path / "captions.csv"
  file.write_text(",file, caption, tags\n0, a.png, a fox, x\n")
  assert tables.read(file)[0].values["caption"].strip() == "a fox"
  file.write_text("caption, id\na fox, 1\n")
  assert tables.read(file, ("caption",))[0].values["caption"] == "a fox"


@pytest.mark.parametrize("mark", ";|\t")
def test_another_separator_is_named(tmp_path, mark):
  """What the header lacks is said, not that a column is missing."""
  (tmp_path / "a.csv").write_text(f"file{mark}caption\na.png{mark}x\n")
  with pytest.raises(UserError, match="no commas between the columns"):
    tables.read(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path, name):
  """Neither a caption nor prompts."""
  file = tmp_path / name
  file.write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
  for read in (tables.read_text, prompt_files.read_prompts):
    with pytest.raises(UserError, match=f"{name}, a pointer of Git LFS"):
      read(file)


def test_a_pipe_is_no_table(tmp_path):
  """It would be waited for."""
  os.mkfifo(tmp_path / "captions.csv")
  with pytest.raises(UserError, match="which is none"):
    tables.read(tmp_path / "captions.csv")


@pytest.mark.parametrize("text", ["\0" * 8, "re\0\0", "a \x1b[31mfox"])
def test_control_characters_are_no_text(text):
  """Such as what a disk filled with zeros; white space is."""
  with pytest.raises(UserError, match="control character .* in here"):
    tables.clean(text, "here")
  assert tables.clean("a\tred\r\n fox", "here") == "a red fox"


@pytest.mark.parametrize("name, text, line", [
    ("captions.tsv", 'file\tcaption\na.png\t"hi" he said\n', 2),
    ("captions.csv", 'file,caption\na.png,x\nb.png,"y\n', 3)])
def test_bad_quotation_marks_name_their_line(tmp_path, name, text, line):
  """A large table is not searched by hand."""
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=f"line {line} .*quotation marks"):
    tables.read(tmp_path / name)
