"""Arrays on disk as orbax lays them out, written piece by piece.

orbax writes only trees that are whole in memory. Here each array is a zarr
folder of its own, filled in any order; then a checkpoint of the same tree is
made around them. What orbax reads back are the shapes of the arrays on disk.
"""

import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ssd_jax import checkpoints

_PIECE = 64 * 2**20  # bytes in float32 of the rows that are handled at a time


def rows_per_piece(shape: tuple[int, ...]) -> int:
  """Rows of a table that are read, written and stored together."""
  return max(1, _PIECE // (4 * math.prod(shape[1:])))


def place(folder: pathlib.Path, path: str) -> pathlib.Path:
  """The folder of the array at a path such as "trunk/layers/attn/q"."""
  top, _, rest = path.partition("/")
  return folder / top / rest.replace("/", ".")


def open_array(
    folder: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype,
    is_stacked: bool,
) -> ts.TensorStore:
  """The array in a folder, made if it is not there.

  Args:
    folder: Its own.
    shape: Of the whole.
    dtype: Of the whole.
    is_stacked: Whether it is written one index of its first axis at a time.
  """
  chunk = (1, *shape[1:]) if is_stacked else (
      min(shape[0], rows_per_piece(shape)), *shape[1:])
  return ts.open({
      "driver": "zarr",
      "kvstore": {"driver": "file", "path": str(folder)},
      "metadata": {
          "shape": shape, "chunks": chunk, "compressor": None,
          "dtype": "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.str,
      },
  }, open=True, create=True).result()


def checksum(folder: pathlib.Path) -> str:
  """What `checkpoints.checksums` says of the array in a folder."""
  store = ts.open({
      "driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)},
  }, open=True).result()
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
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder, tree)
