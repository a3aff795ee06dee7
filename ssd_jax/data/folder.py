"""A user's folder of images with captions.

Captions come from a table (`captions` or, as in Hugging Face's imagefolder,
`metadata`, in any folder, with names relative to it or absolute) or from a text
file beside each image that shares its name. A table needs a file name and a
caption per image and may add tags; the JSON may also map file names to
captions. Images that a table names belong to the data wherever they lie.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import os
import pathlib
import re
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ssd_jax.core.config import UserError
from ssd_jax.data import tables
from ssd_jax.data.pictures import Source, Unreadable, to_square
from ssd_jax.data.tables import Row, one_line
from ssd_jax.storage.files import is_pointer, user_path

T = TypeVar("T")

# A file with one of these is an image, even where Pillow cannot read it.
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif",
    ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".ppm", ".pgm", ".pbm",
)
TABLES = ("captions.csv", "captions.tsv", "captions.json", "captions.jsonl",
          "metadata.csv", "metadata.jsonl")
_UNREAD = ("metadata.parquet", "captions.parquet")
_SNIFFED = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_TEXTS = (".txt", *tables.SUFFIXES)
_NAME_COLUMNS = ("file_name", "file", "filename", "image")
_CAPTION_COLUMNS = ("caption", "text")


@dataclasses.dataclass(frozen=True)
class Caption:
  """The caption of one image.

  Attributes:
    text: The caption, one line.
    tags: Words that describe the image.
    source: File, and line of a table, that the caption comes from.
  """

  text: str
  tags: tuple[str, ...]
  source: str


class FolderSource(Source):
  """All images below a folder, with captions.

  The constructor checks everything but the pixels: each image needs exactly
  one caption and a readable header. Linked folders are followed; hidden files
  and folders are left out.

  Raises:
    UserError: if a file or folder is invalid; the message names it.
  """

  def __init__(self, path: str, pixels: int):
    folder = user_path(path)
    self.pixels = pixels
    files = find_files(folder)
    captions = find_captions(
        [p for p in files if not p.name.startswith(".")])
    name_of = lambda p: pathlib.PurePath(os.path.relpath(p, folder)).as_posix()
    self.paths = tuple(sorted(captions, key=name_of))
    if not self.paths:
      raise UserError(
          f"Expected images, such as .png or .jpg, got {folder} without "
          "images. Put images there or check the path.")
    self.captions = tuple(captions[p] for p in self.paths)
    # Without the suffix, because a.png and a.jpg share a.txt and so a split.
    self.keys = tuple(name_of(_stem(p)) for p in self.paths)
    self.notes = _unused(folder, files, captions)
    check_headers(self.paths)

  def __getitem__(self, index: int) -> dict:
    caption = self.captions[index]
    image = read(self.paths[index], self._fit)
    return {"image": image, "caption": caption.text, "tags": caption.tags}

  def caption(self, index: int) -> str:
    """Returns the caption without reading the image."""
    return self.captions[index].text

  def _fit(self, picture: Image.Image) -> np.ndarray:
    # Decodes a JPEG that is far too large at a fraction of its size.
    picture.draft("RGB", (2 * self.pixels, 2 * self.pixels))
    return to_square(picture, self.pixels)


def read(path: pathlib.Path, use: Callable[[Image.Image], T]) -> T:
  """Returns what `use` makes of an image.

  Raises:
    Unreadable: if it cannot be read.
  """
  try:
    if not path.is_file():  # a broken link; a pipe would be waited for
      raise FileNotFoundError("no such file")
    with Image.open(path) as picture:
      return use(picture)
  except Exception as error:  # a decoder may raise anything on bad bytes
    reason = re.sub(f":? {re.escape(repr(str(path)))}", "", one_line(error))
    if path.is_file() and os.access(path, os.R_OK) and is_pointer(path):
      reason = "a pointer of Git LFS: run git lfs pull in its folder"
    raise Unreadable({str(path): reason}) from error


def check_headers(paths: Sequence[pathlib.Path]) -> None:
  """Raises Unreadable if an image cannot be opened.

  It names all that cannot be read, pixels included: none is found later.
  """
  if _unreadable(paths, lambda picture: None):
    raise Unreadable(_unreadable(paths, lambda picture: picture.load()))


def _unreadable(
    paths: Sequence[pathlib.Path], use: Callable[[Image.Image], Any]
) -> dict[str, str]:
  """Returns what is wrong with images, by their names."""
  found: dict[str, str] = {}
  for path in paths:
    try:
      read(path, use)
    except Unreadable as error:
      found |= error.reasons
  return found


def find_pictures(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns all visible images below a folder, sorted; see `find_files`."""
  return [p for p in find_files(folder)
          if not p.name.startswith(".") and _is_picture(p)]


def find_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns all files below a folder, sorted, but for those of hidden folders.

  Linked folders are followed. Each folder is visited once, so links may form
  circles.

  Raises:
    UserError: if there is no such folder or one that cannot be listed.
  """
  if not folder.is_dir():
    raise UserError(
        f"Expected a folder of images, got {folder}. Check the path.")

  def fail(error: OSError):
    raise UserError(
        f"Expected folders that can be read, got {error.filename} "
        f"({error.strerror}). Change its permissions or remove it."
    ) from error

  found, seen, roots = [], set(), [str(folder)]
  while roots:  # links come last, so that files keep their own names
    for top, folders, names in os.walk(roots.pop(0), onerror=fail):
      real = os.path.realpath(top)
      folders[:] = sorted(f for f in folders if not f.startswith("."))
      if real in seen:
        folders.clear()
        continue
      seen.add(real)
      below = [os.path.join(top, f) for f in folders]
      roots += filter(os.path.islink, below)
      found += [pathlib.Path(top, name) for name in names]
  return sorted(found)


def find_captions(files: list[pathlib.Path]) -> dict[pathlib.Path, Caption]:
  """Returns each image with its caption; a table takes precedence over text.

  Args:
    files: Visible files, among them images, tables and texts.

  Raises:
    UserError: if an image has no caption or two; the message names the first.
  """
  pictures = _Pictures(p for p in files if _is_picture(p))
  captions: dict[pathlib.Path, Caption] = {}
  for table in (p for p in files if p.name.lower() in TABLES + _UNREAD):
    for named, caption in read_table(table):
      path = pictures.find(named)
      if path in captions:
        raise UserError(
            f"Expected one caption per image, got two captions for {path}, in "
            f"{captions[path].source} and {caption.source}. Remove one."
        )
      captions[path] = caption
  for path in pictures.paths:
    beside = _text_beside(path)
    if path not in captions and beside.is_file():
      text = tables.clean(tables.read_text(beside), str(beside))
      captions[path] = Caption(text, (), str(beside))
  missing = [p for p in pictures.paths
             if p not in captions or not captions[p].text]
  if missing:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise UserError(
        "Expected a caption for every image, got no caption for "
        f"{missing[0]}{more}. Add it to one of {', '.join(TABLES)} or to "
        f"{_text_beside(missing[0]).name} beside it."
    )
  return captions


class _Pictures:
  """Images by the files that names lead to, however the names are spelt.

  Attributes:
    paths: The images, each by one name.
  """

  def __init__(self, paths: Iterable[pathlib.Path]):
    self.paths: list[pathlib.Path] = []
    self._by_name: dict[tuple[str, str], pathlib.Path] = {}
    self._by_file: dict[tuple[int, int], pathlib.Path] = {}
    self._real = functools.cache(os.path.realpath)
    for path in paths:
      self._add(path)

  def find(self, path: pathlib.Path) -> pathlib.Path:
    """Returns the image that a table means; one elsewhere is added."""
    known = self._by_name.get(self._place(path))
    return known or self._by_file.get(_file(path)) or self._add(path)

  def _add(self, path: pathlib.Path) -> pathlib.Path:
    self.paths.append(path)
    self._by_name[self._place(path)] = path
    if path.is_file():
      self._by_file.setdefault(_file(path), path)
    return path

  def _place(self, path: pathlib.Path) -> tuple[str, str]:
    """Returns a file's folder, without links and dots, and its name."""
    return self._real(str(path.parent)), path.name


def _file(path: pathlib.Path) -> tuple[int, int]:
  """Returns the number of a file, the same for all of its names."""
  found = path.stat()
  return found.st_dev, found.st_ino


def read_table(table: pathlib.Path) -> list[tuple[pathlib.Path, Caption]]:
  """Returns (image, caption) of every row of a table of captions.

  Raises:
    UserError: if the table or a row is invalid; the message names both.
  """
  if table.name.lower() in _UNREAD:
    raise UserError(
        f"Expected one of {', '.join(TABLES)}, got {table}, which is not read. "
        "Save it as one of these.")
  rows = tables.read(table, _CAPTION_COLUMNS)
  if not rows:
    raise UserError(
        f"Expected the fields {_NAME_COLUMNS[0]} and {_CAPTION_COLUMNS[0]} "
        f"and an entry per image, got {table} without entries. Fill or "
        "remove it."
    )
  return [_entry(table, row) for row in rows]


def _entry(table: pathlib.Path, row: Row) -> tuple[pathlib.Path, Caption]:
  name, text = row.text(_NAME_COLUMNS), row.text(_CAPTION_COLUMNS)
  if name is None or not name.strip() or text is None:
    raise UserError(
        f"Expected the fields {_NAME_COLUMNS[0]} and {_CAPTION_COLUMNS[0]}, "
        f"got {row.where} without a file name or caption. Name them so in the "
        "header, and fill each row."
    )
  path = table.parent / name
  if not _is_file(path):  # as Windows spells it
    path = table.parent / pathlib.PurePosixPath(name.replace("\\", "/"))
  if not _is_file(path):
    raise UserError(
        f"Expected an image, got {row.where} for {path}, which does not "
        "exist. Remove the entry or correct its name.")
  return path, Caption(tables.clean(text, row.where), _tags(row), row.where)


def _is_file(path: pathlib.Path) -> bool:
  try:
    return path.is_file()
  except (OSError, ValueError):  # too long for a name; a zero byte in it
    return False


def _tags(row: Row) -> tuple[str, ...]:
  tags = row.values.get("tags") or ()
  tags = tags.split(",") if isinstance(tags, str) else tags
  if not isinstance(tags, (list, tuple)) or not all(
      isinstance(tag, str) for tag in tags):
    raise UserError(
        "Expected a list of words, or words separated by commas, got "
        f"tags={tags!r} in {row.where}. Correct them.")
  return tuple(t for t in (tables.clean(tag, row.where) for tag in tags) if t)


def _is_picture(path: pathlib.Path) -> bool:
  """Returns whether a file is an image by its suffix or, else, its start."""
  suffix = path.suffix.lower()
  if suffix in SUFFIXES:
    return True
  if suffix in _TEXTS or path.name.lower() in _UNREAD or not path.is_file():
    return False
  Image.init()
  try:
    with Image.open(path, formats=[f for f in _SNIFFED if f in Image.OPEN]):
      return True
  except Exception:  # a decoder may raise anything on other files
    return False


def _stem(path: pathlib.Path) -> pathlib.Path:
  """Returns an image's name without its suffix, if that is an image's."""
  is_suffix = path.suffix.lower() in SUFFIXES
  return path.with_suffix("") if is_suffix else path


def _text_beside(path: pathlib.Path) -> pathlib.Path:
  stem = _stem(path)
  return stem.with_name(f"{stem.name}.txt")


def _unused(folder, files, captions) -> tuple[str, ...]:
  """Returns a note that names files which are neither images nor captions."""
  used = {str(p) for p in captions} | {c.source for c in captions.values()}
  rest = [
      str(p.relative_to(folder)) for p in files
      if str(p) not in used and p.name.lower() not in TABLES
      and (not p.name.startswith(".") or _is_hidden_picture(p))]
  if not rest:
    return ()
  return (f"not used, as neither visible images nor their captions, of {folder}"
          f": {', '.join(rest[:3])}" +
          f" and {len(rest) - 3} more" * (len(rest) > 3),)


def _is_hidden_picture(path: pathlib.Path) -> bool:
  """Returns whether a hidden file is an image and not macOS' notes on one."""
  return path.suffix.lower() in SUFFIXES and not path.name.startswith("._")
