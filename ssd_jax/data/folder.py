"""A user's folder of images with captions.

Captions come from a table (`captions.json`, `captions.csv`, `captions.tsv` or
`metadata.jsonl`, in any folder, with paths relative to it) or from a text file
beside each image that shares its name. A table needs a file name and a caption
per image and may add tags; the JSON may also map file names to captions.
"""

import csv
import dataclasses
import io
import json
import pathlib
from typing import Any

from PIL import Image

from ssd_jax.core.config import UserError
from ssd_jax.data.pictures import Source, to_square

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
TABLES = ("captions.json", "captions.csv", "captions.tsv", "metadata.jsonl")
_NAME_COLUMNS = ("file_name", "file", "filename", "image")
_CAPTION_COLUMNS = ("caption", "text")


@dataclasses.dataclass(frozen=True)
class Caption:
  """The caption of one image.

  Attributes:
    text: The caption, one line.
    tags: Words that describe the image.
    source: File that the caption comes from.
  """

  text: str
  tags: tuple[str, ...]
  source: pathlib.Path


class FolderSource(Source):
  """All images below a folder, with captions.

  The constructor checks everything but the pixels: each image needs exactly
  one caption and a readable header. Hidden files and folders are left out.

  Raises:
    UserError: if a file or folder is invalid; the message names it.
  """

  def __init__(self, path: str, pixels: int):
    folder = pathlib.Path(path).expanduser()
    self.pixels = pixels
    self.paths = find_pictures(folder)
    self.captions = find_captions(folder, self.paths)
    # Without the suffix, because a.png and a.jpg share a.txt and so a split.
    self.keys = tuple(
        p.relative_to(folder).with_suffix("").as_posix() for p in self.paths
    )
    for picture in self.paths:
      self._read(picture, header_only=True)

  def __getitem__(self, index: int) -> dict:
    caption = self.captions[index]
    image = self._read(self.paths[index])
    return {"image": image, "caption": caption.text, "tags": caption.tags}

  def _read(self, path: pathlib.Path, header_only: bool = False):
    try:
      with Image.open(path) as picture:
        if header_only:
          return None
        # Decodes a JPEG that is far too large at a fraction of its size.
        picture.draft("RGB", (2 * self.pixels, 2 * self.pixels))
        return to_square(picture, self.pixels)
    except Exception as error:  # a decoder may raise anything on bad bytes
      raise UserError(
          f"Expected one of {', '.join(SUFFIXES)}, got an image that cannot "
          f"be read, {path} ({one_line(error)}). Replace or remove it."
      ) from error


def one_line(error: Exception) -> str:
  """Returns the message of an error without line breaks."""
  return " ".join(str(error).split()) or type(error).__name__


def find_pictures(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
  """Returns the images below `folder`, in the same order on every machine.

  Raises:
    UserError: if there is no such folder or no image in it.
  """
  if not folder.is_dir():
    raise UserError(
        f"Expected a folder of images, got {folder}. Check the path."
    )
  found = [p for p in _visible_files(folder) if p.suffix.lower() in SUFFIXES]
  if not found:
    raise UserError(
        f"Expected files that end in {', '.join(SUFFIXES)}, got {folder} "
        "without images. Put images there or check the path."
    )
  return tuple(sorted(found, key=lambda p: p.relative_to(folder).as_posix()))


def _visible_files(folder: pathlib.Path) -> list[pathlib.Path]:
  return [
      p for p in folder.rglob("*")
      if not any(part.startswith(".") for part in p.relative_to(folder).parts)
      and p.is_file()
  ]


def find_captions(
    folder: pathlib.Path, pictures: tuple[pathlib.Path, ...]
) -> tuple[Caption, ...]:
  """Returns the caption of each image; a table takes precedence over text.

  Raises:
    UserError: if an image has no caption or two; the message names the first.
  """
  captions: dict[pathlib.Path, Caption] = {}
  for table in sorted(p for p in _visible_files(folder) if p.name in TABLES):
    for path, caption in read_table(table):
      if path in captions:
        raise UserError(
            f"Expected one caption per image, got two captions for {path}, in "
            f"{captions[path].source} and {table}. Remove one."
        )
      captions[path] = caption
  for path in pictures:
    beside = path.with_suffix(".txt")
    if path not in captions and beside.is_file():
      captions[path] = Caption(
          " ".join(_read_text(beside).split()), (), beside)
  missing = [
      p for p in pictures if p not in captions or not captions[p].text]
  if missing:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise UserError(
        "Expected a caption for every image, got no caption for "
        f"{missing[0]}{more}. Add it to one of {', '.join(TABLES)} or to "
        f"{missing[0].with_suffix('.txt').name} beside it."
    )
  return tuple(captions[p] for p in pictures)


def read_table(table: pathlib.Path) -> list[tuple[pathlib.Path, Caption]]:
  """Returns (image, caption) of every row of a table of captions.

  Raises:
    UserError: if the table or a row is invalid; the message names both.
  """
  try:
    rows = _rows(table, _read_text(table))
  except (ValueError, RecursionError, csv.Error) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
        f"Expected a table of captions, got {table}, which is not "
        f"{table.suffix[1:]} ({one_line(error)}). Correct it."
    ) from error
  if not rows:
    raise UserError(
        f"Expected the fields {_NAME_COLUMNS[0]} and {_CAPTION_COLUMNS[0]} "
        f"and an entry per image, got {table} without entries. Fill or "
        "remove it."
    )
  found = []
  for number, row in enumerate(rows, 1):
    name, text = (_field(row, c) for c in (_NAME_COLUMNS, _CAPTION_COLUMNS))
    if name is None or text is None:
      raise UserError(
          f"Expected the fields {_NAME_COLUMNS[0]} and {_CAPTION_COLUMNS[0]}, "
          f"got {table} with entry {number} without a file name or caption. "
          "Name them so."
      )
    path = table.parent / pathlib.PurePosixPath(name.replace("\\", "/"))
    if not path.is_file():
      raise UserError(
          f"Expected an image, got {table} with entry {number} for {path}, "
          "which does not exist. Remove the entry or correct its name.")
    caption = Caption(" ".join(text.split()), _tags(row, table), table)
    found.append((path, caption))
  return found


def _read_text(path: pathlib.Path) -> str:
  try:
    return path.read_text("utf-8-sig")  # spreadsheets add a byte-order mark
  except UnicodeDecodeError as error:
    raise UserError(
        f"Expected UTF-8 text, got {path}, which is not UTF-8 "
        f"({error.reason}). Save it as UTF-8."
    ) from error


def _rows(table: pathlib.Path, text: str) -> list[Any]:
  if table.suffix == ".jsonl":
    return [_parse(line) for line in text.split("\n") if line.strip()]
  if table.suffix == ".json":
    rows = _parse(text)
    if not isinstance(rows, dict):
      return list(rows) if isinstance(rows, list) else [rows]
    return [
        {"file_name": name, **(row if isinstance(row, dict) else
                               {"caption": row})}
        for name, row in rows.items()
    ]
  delimiter = "\t" if table.suffix == ".tsv" else ","
  return list(csv.DictReader(io.StringIO(text, ""), delimiter=delimiter))


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


def _field(row: Any, names: tuple[str, ...]) -> str | None:
  values = [row[n] for n in names if n in row] if isinstance(row, dict) else []
  return values[0] if values and isinstance(values[0], str) else None


def _tags(row: dict, table: pathlib.Path) -> tuple[str, ...]:
  tags = row.get("tags") or ()
  tags = tags.split(",") if isinstance(tags, str) else tags
  if not isinstance(tags, (list, tuple)) or not all(
      isinstance(tag, str) for tag in tags):
    raise UserError(
        "Expected a list of words, or words separated by commas, got "
        f"tags={tags!r} in {table}. Correct them.")
  return tuple(t for t in (tag.strip() for tag in tags) if t)
