"""Atomic file writes, and JSON files."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
from typing import Any

import jax

from ssd_jax.core.config import UserError
from ssd_jax.runtime import interrupts

_POINTER = b"version https://git-lfs.github.com/spec/"


def is_pointer(path: str | os.PathLike) -> bool:
  """Returns whether a file is the pointer that Git LFS leaves for another."""
  with open(path, "rb") as file:
    return file.read(len(_POINTER)) == _POINTER


def user_path(name: str | os.PathLike) -> pathlib.Path:
  """Returns a path as users write it, with ~ expanded where there is a home."""
  return pathlib.Path(os.path.expanduser(name))


def cache_folder() -> pathlib.Path | None:
  """Returns this package's folder in the user's cache, made if missing.

  None if there is no home, or it cannot be written.
  """
  root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = pathlib.Path(root) / "ssd_jax"
  if not folder.is_absolute():  # no home, or a variable that means none
    return None
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
  return folder if os.access(folder, os.W_OK | os.X_OK) else None


def storable_folder(name: str | os.PathLike) -> pathlib.Path:
  """Returns a folder of arrays as users write it, links and ".." resolved.

  Raises:
    UserError: Its path is not UTF-8, which tensorstore asks for.
  """
  path = real_path(name)
  try:
    str(path).encode()
  except UnicodeEncodeError as error:
    raise UserError(
        "Expected a path in UTF-8 for files of arrays, got "
        f"{ascii(str(path))}. Rename it, or choose another.") from error
  return path


def real_path(name: str | os.PathLike) -> pathlib.Path:
  """Returns a path as users write it, links and ".." resolved.

  Links that lead in a circle stay: opening one is an OSError.
  """
  return pathlib.Path(os.path.realpath(user_path(name)))


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path; it replaces `path` when the context exits.

  The temporary path is in the same folder, so the replacement is one rename;
  each host has its own. What a link points to is replaced, not the link.

  Raises:
    UserError: The disk is full, or the folder cannot be written.
  """
  path = real_path(path)
  partial = path.with_name(f".{path.name}.{jax.process_index()}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with interrupts.writing():
      yield partial
      os.replace(partial, path)
  except OSError as error:
    raise UserError(
        "Expected a writable folder with enough room, got "
        f"{error.strerror or error} while writing {path}. Free space or "
        "choose another folder.") from error
  finally:
    with contextlib.suppress(OSError):  # the folder may not be one
      partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a UTF-8 text file atomically."""
  with replacing(path) as partial:
    partial.write_text(text, "utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file atomically."""
  text = json.dumps(value, indent=1, ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError:  # such as the name of a file that is no UTF-8
    text = json.dumps(value, indent=1)
  write_text(path, text + "\n")


def read_json(path: str | os.PathLike, kind: type = object) -> Any:
  """Returns the value of a JSON file.

  Args:
    path: The file.
    kind: Expected type of the value, such as dict.

  Raises:
    UserError: The file is missing, not JSON, or of another kind.
  """
  path = user_path(path)
  try:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, kind):
      raise ValueError("another kind of value")
    return value
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(
        f"Expected a readable JSON file, got {path} (missing or damaged). "
        "Check the path, or make it again."
    ) from error
