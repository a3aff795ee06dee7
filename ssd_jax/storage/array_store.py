"""Arrays on disk in orbax's layout, written in pieces.

orbax only writes trees that fit in memory. Here each array is its own zarr
folder, filled in any order; afterwards a checkpoint of the same tree is made
around the folders. When orbax restores it, it takes the shapes from the arrays
on disk.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import hashlib
import json
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ssd_jax.core.config import UserError
from ssd_jax.storage import checkpoints
from ssd_jax.storage.files import write_text

_PIECE = 64 * 2**20  # float32 bytes of the rows in one piece


def rows_per_piece(shape: tuple[int, ...]) -> int:
  """Returns how many rows of a table are read, written and stored together."""
  return max(1, _PIECE // (4 * math.prod(shape[1:])))


def array_folder(folder: pathlib.Path, path: str) -> pathlib.Path:
  """Returns the folder of the array at a path such as "trunk/layers/attn/q"."""
  top, _, rest = path.partition("/")
  return folder / top / rest.replace("/", ".")


@contextlib.contextmanager
def _disk_errors(folder: pathlib.Path) -> Iterator[None]:
  """Turns errors of tensorstore and of the disk into UserErrors."""
  try:
    yield
  except (ValueError, OSError) as error:  # tensorstore has no own exceptions
    reason = " ".join(str(error).split())[-160:]
    raise UserError(
        f"Expected a disk that can be written and read, got ...{reason} at "
        f"{folder}. Free space, then run the same command again: it resumes "
        "where it stopped.") from error


def write(
    folder: pathlib.Path, shape: tuple[int, ...], value: np.ndarray,
    first: int, is_stacked: bool,
) -> None:
  """Writes rows of an array; creates the array if needed.

  Args:
    folder: Folder of the array.
    shape: Shape of the whole array.
    value: The rows, in the dtype of the array.
    first: Index of the first row.
    is_stacked: Whether the array is written one row at a time.

  Raises:
    UserError: The disk is full or fails.
  """
  chunk = (1, *shape[1:]) if is_stacked else (
      min(shape[0], rows_per_piece(shape)), *shape[1:])
  dtype = value.dtype
  with _disk_errors(folder):
    store = ts.open({
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder)},
        "metadata": {
            "shape": shape, "chunks": chunk, "compressor": None,
            "dtype": "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.str,
        },
    }, open=True, create=True).result()
    store[first:first + len(value)].write(value).result()


def holds(
    folder: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype,
    entries: Sequence[dict[str, Any]],
) -> bool:
  """Returns whether an array holds the rows of the given journal entries.

  Args:
    folder: Folder of the array.
    shape: Expected shape of the array.
    dtype: Expected dtype.
    entries: Journal entries of the rows.
  """
  try:
    store = _open(folder)
    if (store.shape, store.dtype.numpy_dtype) != (shape, dtype):
      return False
    return all(
        digest(store[e["first"]:e["first"] + e["rows"]].read().result())
        == e["sha256"] for e in entries)
  except ValueError:  # missing or damaged
    return False


def digest(value: np.ndarray) -> str:
  """Returns the SHA-256 of an array's bytes."""
  data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
  return hashlib.sha256(data.data).hexdigest()


def _open(folder: pathlib.Path) -> ts.TensorStore:
  return ts.open({
      "driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)},
  }, open=True).result()


def checksum(folder: pathlib.Path) -> str:
  """Returns the checksum of an array on disk, as in `checkpoints.checksums`.

  Raises:
    UserError: The array cannot be read.
  """
  with _disk_errors(folder):
    store = _open(folder)
    shape, dtype = store.shape, store.dtype.numpy_dtype
    step = rows_per_piece(shape)
    pieces = (store[first:min(first + step, shape[0])].read().result()
              for first in range(0, shape[0], step))
    return checkpoints.checksum(pieces, shape, dtype)


def write_skeleton(folder: pathlib.Path, paths: list[list[str]]) -> None:
  """Writes an orbax checkpoint of placeholders, to be replaced by arrays.

  Args:
    folder: Folder of the checkpoint.
    paths: Keys of each array.
  """
  tree: dict[str, Any] = {}
  for path in paths:
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = np.zeros(1, np.float32)
  handler = ocp.PyTreeCheckpointHandler(
      use_ocdbt=False, type_handler_registry=checkpoints.handlers())
  with _disk_errors(folder), checkpoints.one_error(), (
      ocp.Checkpointer(handler)) as checkpointer:
    checkpointer.save(folder, tree)


def move_back(
    arrays: pathlib.Path, model: pathlib.Path, paths: Iterable[str]
) -> None:
  """Moves arrays out of an unfinished model folder.

  Args:
    arrays: Folder to move them to, in which they are filled.
    model: The model folder.
    paths: Paths of the arrays.
  """
  for path in paths:
    array, moved = array_folder(arrays, path), array_folder(model, path)
    if moved.is_dir() and not array.exists():
      array.parent.mkdir(parents=True, exist_ok=True)
      os.rename(moved, array)


def read_journal(file: pathlib.Path, fingerprint: str) -> dict[str, Any]:
  """Returns the journal's entries by unit, up to the first incomplete line.

  A missing journal, or one of another conversion, has no entries.

  Args:
    file: The journal.
    fingerprint: Fingerprint of the conversion.
  """
  if not file.is_file():
    return {}
  entries = []
  for line in file.read_text("utf-8", "replace").split("\n"):
    try:
      entries.append(json.loads(line))
    except ValueError:
      break
  if not entries or entries[0] != {"fingerprint": fingerprint}:
    return {}
  return {entry["unit"]: entry for entry in entries[1:]}


def write_journal(
    file: pathlib.Path, fingerprint: str, entries: Iterable[dict[str, Any]]
) -> None:
  """Rewrites the journal, which removes an incomplete line at its end.

  Args:
    file: The journal.
    fingerprint: Fingerprint of the conversion.
    entries: Its entries.
  """
  lines = [{"fingerprint": fingerprint}, *entries]
  write_text(file, "".join(json.dumps(x) + "\n" for x in lines))
