"""Arrays on disk as orbax lays them out, written piece by piece.

orbax writes only trees that are whole in memory. Here each array is a zarr
folder of its own, filled in any order; then a checkpoint of the same tree is
made around them. What orbax reads back are the shapes of the arrays on disk.
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

_PIECE = 64 * 2**20  # bytes in float32 of the rows that are handled at a time


def rows_per_piece(shape: tuple[int, ...]) -> int:
  """Rows of a table that are read, written and stored together."""
  return max(1, _PIECE // (4 * math.prod(shape[1:])))


def place(folder: pathlib.Path, path: str) -> pathlib.Path:
  """The folder of the array at a path such as "trunk/layers/attn/q"."""
  top, _, rest = path.partition("/")
  return folder / top / rest.replace("/", ".")


@contextlib.contextmanager
def _told(folder: pathlib.Path) -> Iterator[None]:
  """Inside, what tensorstore and the disk refuse is a UserError."""
  try:
    yield
  except (ValueError, OSError) as error:  # tensorstore has no kind of its own
    reason = " ".join(str(error).split())[-160:]
    raise UserError(
        "Expected a disk that takes and gives back what is written, got "
        f"...{reason} at {folder}. Free space, then run the same command "
        "again: it goes on where it stopped.") from error


def write(
    folder: pathlib.Path, shape: tuple[int, ...], value: np.ndarray,
    first: int, is_stacked: bool,
) -> None:
  """Writes rows of the array in a folder, made if it is not there.

  Args:
    folder: The array's own.
    shape: Of the whole.
    value: The rows, in the dtype of the whole.
    first: Where they begin.
    is_stacked: Whether it is written one row at a time.

  Raises:
    UserError: when the disk is full or fails.
  """
  chunk = (1, *shape[1:]) if is_stacked else (
      min(shape[0], rows_per_piece(shape)), *shape[1:])
  dtype = value.dtype
  with _told(folder):
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
  """Whether the array in a folder has the rows of these journal entries."""
  try:
    store = _open(folder)
    if (store.shape, store.dtype.numpy_dtype) != (shape, dtype):
      return False
    return all(
        digest(store[e["first"]:e["first"] + e["rows"]].read().result())
        == e["sha256"] for e in entries)
  except ValueError:  # lost or damaged
    return False


def digest(value: np.ndarray) -> str:
  """SHA-256 of an array's bytes."""
  data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
  return hashlib.sha256(data.data).hexdigest()


def _open(folder: pathlib.Path) -> ts.TensorStore:
  return ts.open({
      "driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)},
  }, open=True).result()


def checksum(folder: pathlib.Path) -> str:
  """What `checkpoints.checksums` says of the array in a folder.

  Raises:
    UserError: when it cannot be read.
  """
  with _told(folder):
    store = _open(folder)
    shape, dtype = store.shape, store.dtype.numpy_dtype
    step = rows_per_piece(shape)
    pieces = (store[first:min(first + step, shape[0])].read().result()
              for first in range(0, shape[0], step))
    return checkpoints.checksum(pieces, shape, dtype)


def write_skeleton(folder: pathlib.Path, paths: list[list[str]]) -> None:
  """Writes an orbax checkpoint whose arrays are yet to be put in place."""
  tree: dict[str, Any] = {}
  for path in paths:
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = np.zeros(1, np.float32)
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
  with _told(folder), ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder, tree)


def take_back(
    arrays: pathlib.Path, model: pathlib.Path, paths: Iterable[str]
) -> None:
  """Moves what was put into a checkpoint back to where it is filled."""
  for path in paths:
    array, moved = place(arrays, path), place(model, path)
    if moved.is_dir() and not array.exists():
      array.parent.mkdir(parents=True, exist_ok=True)
      os.rename(moved, array)


def read_journal(file: pathlib.Path, fingerprint: str) -> dict[str, Any]:
  """Its entries by unit, to the first line that was not written whole.

  There are none in a journal that is lost, or of another conversion.
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
  """Writes it anew: a torn line at its end would spoil the next one."""
  lines = [{"fingerprint": fingerprint}, *entries]
  checkpoints.write_text(file, "".join(json.dumps(x) + "\n" for x in lines))
