"""Tables of a user's texts, CSV, TSV, JSON and JSON lines, read whole.

A row that does not fit its header is an error that names the file and the line:
a reader that guesses loses text without a word.
"""

from collections.abc import Iterator
import csv
import dataclasses
import io
import json
import pathlib
import re
from typing import Any

from ssd_jax.core.config import UserError
from ssd_jax.storage.files import is_pointer

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    values: Its fields by name; anything else that JSON can hold if the row is
      no object.
    where: File and line, or entry, for messages.
  """

  values: Any
  where: str

  def text(self, names: tuple[str, ...]) -> str | None:
    """Returns the first field of these names that exists, if it is text."""
    if not isinstance(self.values, dict):
      return None
    found = [self.values[name] for name in names if name in self.values]
    return found[0] if found and isinstance(found[0], str) else None


def read(
    path: pathlib.Path, texts: tuple[str, ...] = (), quotes: bool = True
) -> list[Row]:
  """Returns the rows of a table of the kind that its suffix names.

  Args:
    path: The table. A JSON object maps file names to captions or rows.
    texts: Names of columns of texts, in which commas are likely.
    quotes: Whether quotation marks of CSV and TSV enclose fields.

  Raises:
    UserError: if the table is not what its suffix says.
  """
  text, suffix = read_text(path), path.suffix.lower()
  try:
    if suffix == ".jsonl":
      return list(_json_lines(path, text))
    if suffix == ".json":
      return [Row(row, f"{path} entry {number}")
              for number, row in enumerate(_json_rows(text), 1)]
    delimiter = "\t" if suffix == ".tsv" else ","
    return list(_separated(path, text, delimiter, texts, quotes))
  except (ValueError, RecursionError, csv.Error) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
        f"Expected a table, got {path}, which is not {suffix[1:]} "
        f"({one_line(error)}). Correct it.") from error


def read_text(path: pathlib.Path) -> str:
  """Returns the text of a UTF-8 file, without a byte-order mark.

  Raises:
    UserError: if it cannot be read or is not UTF-8.
  """
  if path.exists() and not path.is_file():  # a pipe would be waited for
    raise UserError(f"Expected a text file, got {path}, which is none. Check "
                    "the path.")
  try:
    refuse_pointer(path)
    return path.read_text("utf-8-sig")  # spreadsheets add a byte-order mark
  except UnicodeDecodeError as error:
    raise UserError(
        f"Expected UTF-8 text, got {path}, which is not UTF-8 "
        f"({error.reason}). Save it as UTF-8.") from error
  except OSError as error:
    raise UserError(
        f"Expected a text file, got {path}, which cannot be read "
        f"({error.strerror}). Check the path.") from error


def refuse_pointer(path: pathlib.Path) -> None:
  """Raises UserError if a file is what Git LFS leaves for a text."""
  if path.is_file() and is_pointer(path):  # a pipe is read once
    raise UserError(
        f"Expected a text file, got {path}, a pointer of Git LFS. Run git lfs "
        "pull in its folder.")


def clean(text: str, where: str) -> str:
  """Returns a text on one line, checked as by `check_text`."""
  check_text(text, where)
  return " ".join(text.split())


def check_text(text: str, where: str) -> None:
  """Raises UserError if a text holds what is no text.

  That is half a character, which JSON can spell, or control characters, as of a
  file that a disk filled with zeros.

  Args:
    text: The text.
    where: Its place, for the message.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
        f"Expected Unicode text, got half of a surrogate pair in {where}. "
        "Correct it.") from error
  if found := _CONTROL.search(text):
    raise UserError(
        f"Expected text, got the control character {found[0]!r} in {where}. "
        "Correct it.")


def one_line(error: Exception) -> str:
  """Returns the message of an error without line breaks."""
  return " ".join(str(error).split()) or type(error).__name__


def _separated(
    path: pathlib.Path, text: str, delimiter: str, texts: tuple[str, ...],
    quotes: bool,
) -> Iterator[Row]:
  lines = io.StringIO(text, "").readlines()  # as the reader counts them
  reader = csv.reader(
      io.StringIO(text, ""), delimiter=delimiter, strict=True,
      quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE)
  typed = next(reader, [])
  header = [name.strip().lower() for name in typed]
  # A style of spaces behind all commas tells nothing of texts that were cut.
  is_text_first = header[:1] and header[0] in texts and not any(
      name[:1] == " " for name in typed)
  others, name = ("[;|\t]", "commas") if delimiter == "," else (
      "[;|,]", "tabs")
  if len(header) == 1 and re.search(others, header[0]):
    raise ValueError(f"no {name} between the columns of its header")
  twice = {name for name in header if name and header.count(name) > 1}
  if twice:
    raise ValueError(f"the column {min(twice)!r} occurs twice")
  for fields in filter(None, _rows(reader, path)):  # blank lines
    where = f"{path} line {reader.line_num}"
    if any(fields[len(header):]):
      advice = ('Put a text with separators into "quotes"' if quotes else
                "Take the separators out of its text")
      raise UserError(
          f"Expected {len(header)} fields, as in the header, got "
          f"{len(fields)} in {where}, the last of them {fields[-1]!r}. "
          f"{advice}.")
    if quotes and delimiter == ",":
      _check_commas(header, fields, lines[reader.line_num - 1], where,
                    bool(is_text_first))
    yield Row(dict(zip(header, fields)), where)


def _rows(reader: Any, path: pathlib.Path) -> Iterator[list[str]]:
  """Yields a reader's rows; its errors name the line."""
  try:
    yield from reader
  except csv.Error as error:
    raise UserError(
        f"Expected a row of a table, got {path} line {reader.line_num} "
        f"({one_line(error)}). Correct its quotation marks.") from error


def _check_commas(
    header: list[str], fields: list[str], line: str, where: str,
    is_text_first: bool,
) -> None:
  """Raises UserError if a row looks as if a text with commas was cut.

  Then a column without a name holds something, or some fields without quotes
  begin with a space, as text does behind a comma, and some do not. Behind a
  text in the first column there may be no other field to compare with.
  """
  later = [(name, field) for name, field in list(zip(header, fields))[1:]
           if field]
  nameless = [field for name, field in later if not name]
  spaced = [field for _, field in later if field[:1] == " "
            and f",{field}" in line]
  is_odd = is_text_first or len(spaced) < len(later)
  cut = nameless or (spaced if is_odd else [])
  if cut:
    raise UserError(
        f"Expected a text with commas in quotes, got {cut[0]!r} behind a comma "
        f"in {where}. Put the whole text into \"quotes\".")


def _json_lines(path: pathlib.Path, text: str) -> Iterator[Row]:
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      where = f"{path} line {number}"
      try:
        yield Row(_parse(line), where)
      except (ValueError, RecursionError) as error:
        raise UserError(
            f"Expected a JSON object on each line, got {where} "
            f"({one_line(error)}). Correct it.") from error


def _json_rows(text: str) -> list[Any]:
  rows = _parse(text)
  if not isinstance(rows, dict):
    return list(rows) if isinstance(rows, list) else [rows]
  return [
      {"file_name": name, **(row if isinstance(row, dict) else
                             {"caption": row})}
      for name, row in rows.items()
  ]


def _parse(text: str) -> Any:
  """Parses JSON and raises ValueError if a name occurs twice."""

  def once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
      names = [name for name, _ in pairs]
      twice = next(n for n in names if names.count(n) > 1)
      raise ValueError(f"{twice!r} occurs twice")
    return found

  return json.loads(text, object_pairs_hook=once)
