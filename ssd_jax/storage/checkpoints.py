"""Parameters on disk: orbax folders, written whole or not at all."""

import asyncio
from collections.abc import Iterable
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from ssd_jax.core.config import UserError
from ssd_jax.runtime import sharding

CHECKSUMS = "checksums.json"  # beside orbax's files: of each array's bytes


def save(folder: str | os.PathLike, tree: Any, dtype: Any = None) -> None:
  """Writes a tree of arrays as an orbax checkpoint, replacing what is there.

  Args:
    folder: Becomes the checkpoint; appears by one rename.
    tree: Nested dicts of arrays.
    dtype: Of the stored floating-point arrays; None keeps theirs.
  """
  folder = pathlib.Path(folder).absolute()
  tree = sharding.fetch(tree)
  if jax.process_index() == 0:
    _write(folder, tree, dtype)
  sharding.barrier(f"saved {folder.name}")


def _write(folder: pathlib.Path, tree: Any, dtype: Any) -> None:
  folder.parent.mkdir(parents=True, exist_ok=True)
  cast = lambda x: (
      np.asarray(x, dtype)
      if dtype is not None and _is_float(np.asarray(x))
      else np.asarray(x)
  )
  staging = pathlib.Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
  try:
    stored = jax.tree.map(cast, tree)
    with _checkpointer() as checkpointer:
      checkpointer.save(staging / "new", stored)
    write_json(staging / "new" / CHECKSUMS, checksums(stored))
    if folder.exists():
      os.rename(folder, staging / "old")
    os.rename(staging / "new", folder)
  finally:
    shutil.rmtree(staging, ignore_errors=True)


def restore(folder: str | os.PathLike) -> Any:
  """The tree of numpy arrays in a folder written by `save`.

  Raises:
    UserError: when there is none, or it is damaged, a single bit included.
  """
  folder = pathlib.Path(folder).absolute()
  if not folder.is_dir():
    raise UserError(
        "Expected a folder written by training or infer.convert, got no "
        f"checkpoint at {folder}. Check the path."
    )
  try:
    with _checkpointer() as checkpointer:
      tree = checkpointer.metadata(folder).item_metadata.tree
      args = jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
      )
      restored = checkpointer.restore(folder, restore_args=args)
  except Exception as error:  # orbax raises many kinds for a damaged folder
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise _damaged(folder, reason[:120]) from error
  if (folder / CHECKSUMS).is_file():
    stored, found = read_json(folder / CHECKSUMS), checksums(restored)
    wrong = [name for name in found if stored.get(name) != found[name]]
    if wrong:
      raise _damaged(folder, f"{wrong[0]} differs from its checksum")
  return restored


def check_shapes(
    folder: str | os.PathLike, tree: Any, expected: Any,
    source: str = "by the settings beside it",
    advice: str = "Take the parts of one model",
) -> None:
  """Raises UserError unless a restored tree has the expected arrays.

  Args:
    folder: That it was restored from.
    tree: Of anything with a shape.
    expected: The same.
    source: Where the expectation comes from.
    advice: What to do.
  """
  got, wanted = _shapes(tree), _shapes(expected)
  for name in sorted(got.keys() | wanted.keys()):
    if got.get(name) != wanted.get(name):
      raise UserError(
          f"Expected shape {wanted.get(name, 'none')} {source}, got {name} of "
          f"shape {got.get(name, 'none')} in {folder}. {advice}.")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {_name(path): tuple(leaf.shape) for path, leaf in leaves
          if hasattr(leaf, "shape")}


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def checksums(tree: Any) -> dict[str, str]:
  """Type, shape and CRC-32 of each array's bytes, by its place in the tree."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {_name(path): checksum([leaf], leaf.shape, leaf.dtype)
          for path, leaf in leaves}


def checksum(
    pieces: Iterable[np.ndarray], shape: tuple[int, ...], dtype: Any
) -> str:
  """What `checksums` says of an array that comes in pieces of its rows."""
  total = 0
  for piece in pieces:
    flat = np.ascontiguousarray(piece).reshape(-1)
    total = zlib.crc32(flat.view(np.uint8).data, total)
  return f"{np.dtype(dtype)} {list(shape)} {total:08x}"


def identity(folder: str | os.PathLike) -> str:
  """A short name of the weights in a folder that `save` wrote.

  Raises:
    UserError: when it was not, and has no checksums.
  """
  path = pathlib.Path(folder) / CHECKSUMS
  if not path.is_file():
    raise _damaged(path.parent, f"no {CHECKSUMS}")
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _damaged(folder: pathlib.Path, reason: str) -> UserError:
  return UserError(
      f"Expected a whole one, got a damaged checkpoint at {folder} "
      f"({reason}). Train or convert again.")


class _Patient(ocp.type_handlers.NumpyHandler):
  """Reads all arrays to their end, also when one of them cannot be read.

  orbax closes its event loop at the first failure; each read that ended later
  would print that the loop is closed.
  """

  async def deserialize(self, infos, args=None):
    """The arrays; raises the first failure."""
    read = super().deserialize
    args = args or [ocp.RestoreArgs()] * len(infos)
    found = await asyncio.gather(
        *(read([info], [arg]) for info, arg in zip(infos, args, strict=True)),
        return_exceptions=True)
    for one in found:
      if isinstance(one, BaseException):
        raise one
    return [one[0] for one in found]


def _checkpointer() -> ocp.Checkpointer:
  """Of this host alone: each reads for itself, the first one writes."""
  index, options = jax.process_index(), ocp.options.MultiprocessingOptions()
  if jax.process_count() > 1:
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index},
        barrier_sync_key_prefix=f"host{index}")
  handlers = ocp.type_handlers.create_type_handler_registry(
      (np.ndarray, _Patient()), (jax.Array, ocp.type_handlers.ArrayHandler()))
  return ocp.Checkpointer(
      ocp.PyTreeCheckpointHandler(
          multiprocessing_options=options, type_handler_registry=handlers),
      multiprocessing_options=options)


def cast(tree: Any, dtype: Any) -> Any:
  """The tree with floating-point leaves as device arrays of `dtype`, each where
  it lies on the mesh if one is set."""
  if sharding.current() is None:
    return jax.tree.map(
        lambda x: jax.numpy.asarray(x, dtype if _is_float(x) else None), tree)
  # On the host: the whole need not fit on one device.
  is_right = lambda x: not _is_float(x) or x.dtype == dtype
  return sharding.shard_params(jax.tree.map(
      lambda x: x if is_right(x) else np.asarray(x, dtype), tree))


def _is_float(x: Any) -> bool:
  """Whether x is of a floating-point type, bfloat16 among them."""
  return jax.numpy.issubdtype(x.dtype, np.floating)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON by one rename."""
  write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file by one rename; hosts may do so at the same time."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{jax.process_index()}.partial")
  partial.write_text(text, "utf-8")
  os.replace(partial, path)


def read_json(path: str | os.PathLike) -> Any:
  """The value of a JSON file.

  Raises:
    UserError: when it is missing or no JSON.
  """
  path = pathlib.Path(path)
  try:
    return json.loads(path.read_text("utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(
        f"Expected JSON of a model folder, got an unreadable {path}. Check "
        "the path, or train or convert again."
    ) from error
