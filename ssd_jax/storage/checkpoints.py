"""Orbax checkpoints of parameters, written atomically."""

import asyncio
from collections.abc import Awaitable, Iterable, Iterator, Sequence
import contextlib
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
import threading
from typing import Any
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from ssd_jax.core.config import UserError
from ssd_jax.runtime import interrupts, sharding
from ssd_jax.storage.files import (
  read_json,
  storable_folder,
  user_path,
  write_json,
)

CHECKSUMS = "checksums.json"  # checksums of all arrays, beside orbax's files


def save(folder: str | os.PathLike, tree: Any, dtype: Any = None) -> None:
  """Writes a tree of arrays as an orbax checkpoint, replacing an old one.

  Args:
    folder: Folder of the checkpoint; it appears by one rename.
    tree: Nested dicts of arrays.
    dtype: Type to store floating-point arrays in; None keeps theirs.
  """
  folder = storable_folder(folder)
  tree = sharding.fetch(tree)
  if jax.process_index() == 0:
    with interrupts.writing():
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
    with one_error(), _checkpointer() as checkpointer:
      checkpointer.save(staging / "new", stored)
    write_json(staging / "new" / CHECKSUMS, checksums(stored))
    if folder.exists():
      os.rename(folder, staging / "old")
    os.rename(staging / "new", folder)
  finally:
    shutil.rmtree(staging, ignore_errors=True)


def restore(folder: str | os.PathLike) -> Any:
  """Restores the tree of numpy arrays in a folder written by `save`.

  Raises:
    UserError: There is no checkpoint, or it is damaged, even by a single bit.
  """
  folder = storable_folder(folder)
  if not folder.is_dir():
    raise UserError(
        "Expected a folder written by training or infer.convert, got no "
        f"checkpoint at {folder}. Check the path."
    )
  try:
    with silenced(), _checkpointer() as checkpointer:
      tree = checkpointer.metadata(folder).item_metadata.tree
      args = jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
      )
      restored = checkpointer.restore(folder, restore_args=args)
  except Exception as error:  # orbax raises many types for a damaged folder
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise _damaged(folder, reason[:120]) from error
  if (folder / CHECKSUMS).is_file():
    stored, found = read_json(folder / CHECKSUMS, dict), checksums(restored)
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
    folder: Folder that the tree was restored from.
    tree: Tree of objects with a shape.
    expected: Tree with the expected shapes.
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
  """Returns dtype, shape and CRC-32 of each array, by its path in the tree."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {_name(path): checksum([leaf], leaf.shape, leaf.dtype)
          for path, leaf in leaves}


def checksum(
    pieces: Iterable[np.ndarray], shape: tuple[int, ...], dtype: Any
) -> str:
  """Returns the checksum of an array given as pieces of its rows.

  Args:
    pieces: The rows, in order.
    shape: Shape of the whole array.
    dtype: Its dtype.
  """
  total = 0
  for piece in pieces:
    flat = np.ascontiguousarray(piece).reshape(-1)
    total = zlib.crc32(flat.view(np.uint8).data, total)
  return f"{np.dtype(dtype)} {list(shape)} {total:08x}"


def identity(folder: str | os.PathLike) -> str:
  """Returns a short identifier of the weights in a folder written by `save`.

  Raises:
    UserError: The folder has no checksums.
  """
  path = user_path(folder) / CHECKSUMS
  if not path.is_file():
    raise _damaged(path.parent, f"no {CHECKSUMS}")
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _damaged(folder: pathlib.Path, reason: str) -> UserError:
  return UserError(
      f"Expected an intact checkpoint, got a damaged checkpoint at {folder} "
      f"({reason}). Train or convert again.")


class _All:
  """A future of several futures; it raises their first error."""

  def __init__(self, futures: Sequence[Any]):
    self._futures = futures

  def result(self, timeout: int | None = None) -> None:
    """Waits for all; raises the first error."""
    errors = []
    for one in self._futures:
      try:
        one.result(timeout)
      except Exception as error:  # orbax raises many types
        errors.append(error)
    if errors:
      raise errors[0]


class _WaitingHandler(ocp.type_handlers.NumpyHandler):
  """Waits for all reads and writes, even if one of them fails.

  orbax closes its event loop at the first failure; each of the others that
  finishes later would print that the loop is closed.
  """

  async def serialize(self, values, infos, args=None):
    """Returns a future of all arrays; each write has a loop of its own."""
    args = args or [ocp.SaveArgs()] * len(values)
    futures: list[Any] = []
    for value, info, arg in zip(values, infos, args, strict=True):
      futures += await super().serialize([value], [info], [arg])
    return [_All(futures)]

  async def deserialize(self, infos, args=None):
    """Returns the arrays; raises the first failure."""
    read = super().deserialize
    args = args or [ocp.RestoreArgs()] * len(infos)
    return await _all_of(
        read([info], [arg]) for info, arg in zip(infos, args, strict=True))

  async def metadata(self, infos):
    """Returns the arrays' metadata; raises the first failure."""
    read = super().metadata
    return await _all_of(read([info]) for info in infos)


async def _all_of(reads: Iterable[Awaitable[Sequence[Any]]]) -> list[Any]:
  """Returns the item of each read, once all have ended."""
  found: list[Any] = await asyncio.gather(*reads, return_exceptions=True)
  for one in found:
    if isinstance(one, BaseException):
      raise one
  return [one[0] for one in found]


@contextlib.contextmanager
def silenced() -> Iterator[None]:
  """Silences orbax's log of unreadable files; the raised error reports it."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)


@contextlib.contextmanager
def one_error() -> Iterator[None]:
  """Silences further errors of a failed save; the first one is raised."""
  hook = threading.excepthook
  threading.excepthook = lambda args: None
  try:
    with silenced():
      yield
  finally:
    threading.excepthook = hook


def handlers() -> Any:
  """Returns what reads and writes arrays for orbax: one error per failure."""
  return ocp.type_handlers.create_type_handler_registry(
      (np.ndarray, _WaitingHandler()),
      (jax.Array, ocp.type_handlers.ArrayHandler()))


def _checkpointer() -> ocp.Checkpointer:
  """Returns a checkpointer of this host alone: each host reads for itself."""
  index, options = jax.process_index(), ocp.options.MultiprocessingOptions()
  if jax.process_count() > 1:
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index},
        barrier_sync_key_prefix=f"host{index}")
  return ocp.Checkpointer(
      ocp.PyTreeCheckpointHandler(
          multiprocessing_options=options, type_handler_registry=handlers()),
      multiprocessing_options=options)


def cast(tree: Any, dtype: Any) -> Any:
  """Converts floating-point leaves to `dtype` and puts all on the devices.

  If a mesh is set, the arrays are sharded over it.
  """
  if sharding.current() is None:
    return jax.tree.map(
        lambda x: jax.numpy.asarray(x, dtype if _is_float(x) else None), tree)
  # Converts on the host, as the tree may not fit on one device.
  is_right = lambda x: not _is_float(x) or x.dtype == dtype
  return sharding.shard_params(jax.tree.map(
      lambda x: x if is_right(x) else np.asarray(x, dtype), tree))


def _is_float(x: Any) -> bool:
  """Returns whether x has a floating-point type, bfloat16 included."""
  return jax.numpy.issubdtype(x.dtype, np.floating)
