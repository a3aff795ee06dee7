"""Reads tensors of published checkpoints from disk, in pieces.

safetensors files are read by their library. The zip archives of `torch.save`
and `torch.jit.save` are read without torch: a conversion then needs neither
torch nor its memory, and the unpickler runs nothing that a file names
(docs/models.md has figures).
"""

from collections.abc import Mapping
import dataclasses
import io
import math
import pathlib
import pickle
import struct
from typing import Any
import zipfile
import zlib

import numpy as np
import safetensors

from ssd_jax.convert import unpickle
from ssd_jax.core.config import UserError

_AGAIN = "Download it again"
_SAFE_FLOATS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Keys of what trainers save; the first that is there is the model.
_WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "ema",
             "model_ema", "ema_model", "ema_state_dict", "params_ema", "params")
_DEEPEST = 4  # nested wrappers
_SHOWN = 6  # keys listed in an error
# Exceptions that parsing a damaged file may raise; they become UserErrors.
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
    RuntimeError, MemoryError, EOFError, struct.error, zlib.error,
    pickle.UnpicklingError)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file, not loaded into memory.

  Attributes:
    file: The file.
    offset: Offset of the first byte.
    shape: Shape of the tensor.
    dtype: Its numpy type.
    strides: Strides in elements, or None if it is C-contiguous.
  """

  file: pathlib.Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype
  strides: tuple[int, ...] | None = None

  @property
  def kind(self) -> str:
    """Name of its dtype."""
    return self.dtype.name

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Reads the tensor, or its rows `start` to `stop` (exclusive)."""
    if not self.shape:
      return self._bytes(0, 1).reshape(())
    stop = self.shape[0] if stop is None else stop
    shape = (stop - start, *self.shape[1:])
    if self.strides is None:
      row = math.prod(self.shape[1:])
      return self._bytes(start * row, (stop - start) * row).reshape(shape)
    span = 1 + sum(
        (n - 1) * s for n, s in zip(shape, self.strides, strict=True))
    flat = self._bytes(start * self.strides[0], span)
    strides = [s * self.dtype.itemsize for s in self.strides]
    return np.lib.stride_tricks.as_strided(flat, shape, strides).copy()

  def _bytes(self, first: int, count: int) -> np.ndarray:
    size = self.dtype.itemsize
    data = np.empty(count * size, np.uint8)
    with open(self.file, "rb") as f:
      f.seek(self.offset + first * size)
      if f.readinto(data.data) != data.size:
        raise UserError("Expected a file with the bytes of all its tensors, "
                        f"got a truncated {self.file}. {_AGAIN}.")
    return data.view(self.dtype)


@dataclasses.dataclass(frozen=True)
class SafeTensor:
  """A tensor in a safetensors file, not loaded into memory.

  Attributes:
    file: The file.
    name: Name of the tensor.
    shape: Shape of the tensor.
    kind: Name of its dtype.
  """

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  kind: str

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Reads the tensor, or its rows `start` to `stop` (exclusive)."""
    with safetensors.safe_open(self.file, "numpy") as opened:
      if not self.shape:
        return opened.get_tensor(self.name)
      return opened.get_slice(self.name)[start:stop]


def read_file(file: pathlib.Path) -> Mapping[str, Tensor | SafeTensor]:
  """Returns the tensors of one file by name."""
  if file.suffix == ".safetensors":
    return _read_safetensors(file)
  return _read_torch(file)


def _read_safetensors(file: pathlib.Path) -> dict[str, Tensor | SafeTensor]:
  try:
    with safetensors.safe_open(file, "numpy") as opened:
      slices = {name: opened.get_slice(name) for name in opened.keys()}
      kinds = {name: x.get_dtype() for name, x in slices.items()}
      shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"Expected a safetensors file, got a damaged {file} "
                    f"({_short(error)}). {_AGAIN}.") from error
  return {name: SafeTensor(file, name, shapes[name],
                           _SAFE_FLOATS.get(kinds[name], kinds[name]))
          for name in slices}


def _short(error: BaseException) -> str:
  """Returns an error's message, shortened to one line."""
  return " ".join(str(error).split())[:120] or type(error).__name__


def _read_torch(file: pathlib.Path) -> dict[str, Tensor]:
  try:
    with zipfile.ZipFile(file) as archive:
      entries = {info.filename: info for info in archive.infolist()}
      pickled = [name for name in entries if name.endswith("/data.pkl")]
      if len(pickled) != 1:
        raise UserError(f"Expected a file of torch.save, got {file} without a "
                        "data.pkl. Check the file.")
      root = pickled[0][: -len("data.pkl")]
      order = root + "byteorder"
      if order in entries and archive.read(order).strip() != b"little":
        raise UserError("Expected little-endian numbers, got a big-endian "
                        f"{file}. Save it again on another machine.")
      unpickler = unpickle.Unpickler(
          io.BytesIO(archive.read(pickled[0])), file)
      tree = unpickler.load()
      with open(file, "rb") as f:
        offset_of = lambda storage: _data_offset(
            f, entries[f"{root}data/{storage.key}"], storage)
        return _state_dict(tree, file, offset_of)
  except zipfile.BadZipFile as error:
    raise UserError(
        f"Expected a complete file of torch.save, got {file}, which is no zip "
        f"archive, truncated, or written before torch 1.6. {_AGAIN}, or load "
        "and save it with a newer torch.") from error
  except UserError:
    raise
  except _DAMAGE as error:
    raise UserError(f"Expected a file of torch.save, got a damaged {file} "
                    f"({_short(error)}). {_AGAIN}.") from error


def _data_offset(
    f: io.BufferedReader, info: zipfile.ZipInfo, storage: unpickle.Storage
) -> int:
  """Returns the offset of a storage, an entry of a zip archive."""
  if info.file_size < storage.count * storage.dtype.itemsize:
    raise pickle.UnpicklingError(f"storage {storage.key} is too short")
  if info.compress_type != zipfile.ZIP_STORED:
    raise UserError("Expected a file of torch.save, got a compressed "
                    f"{f.name}. Unpack it and save it again.")
  f.seek(info.header_offset)
  name, extra = struct.unpack("<26xHH", f.read(30))
  return info.header_offset + 30 + name + extra


def _state_dict(
    tree: Any, file: pathlib.Path, offset_of
) -> dict[str, Tensor]:
  """Returns the tensors of an unpickled object, without its wrappers."""
  for _ in range(_DEEPEST):  # a wrapper may have tensors beside it
    tree = tree.tensors() if isinstance(tree, unpickle.Module) else tree
    inner = [tree[name] for name in _WRAPPERS
             if isinstance(tree, dict) and isinstance(tree.get(name), dict)]
    tree = inner[0] if inner else tree
  if not isinstance(tree, dict):
    raise UserError(f"Expected a state dict, got {file}, which holds no "
                    "dictionary. Check the file.")
  views = {str(name): view for name, view in tree.items()
           if isinstance(view, unpickle.View)}
  if not views:
    others = ", ".join(sorted(map(repr, tree))[:_SHOWN]) or "nothing"
    raise UserError(f"Expected a state dict, got {file} without tensors, with "
                    f"{others} in it. Save the model's state dict alone.")
  return {name: _tensor(view, file, offset_of) for name, view in views.items()}


def _tensor(view: unpickle.View, file: pathlib.Path, offset_of) -> Tensor:
  dtype = view.storage.dtype
  dense: list[int] = []
  step = 1
  for n in reversed(view.shape):
    dense.insert(0, step)
    step *= n
  last = view.offset + sum(
      (n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
  if last >= view.storage.count and 0 not in view.shape:
    raise pickle.UnpicklingError("a tensor beyond its storage")
  ordered = all(n == 1 or a == b for n, a, b in zip(
      view.shape, view.strides, dense, strict=True))
  return Tensor(
      file, offset_of(view.storage) + view.offset * dtype.itemsize, view.shape,
      dtype, None if ordered else view.strides)
