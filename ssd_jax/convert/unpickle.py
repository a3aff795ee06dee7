"""Parses the pickle in a file of torch.save or torch.jit.save, without torch.

The unpickler supports only tensors: it neither imports nor calls anything that
the file names.
"""

from collections import OrderedDict
import dataclasses
import pathlib
import pickle
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ssd_jax.core.config import UserError

_TORCH_DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32,
    "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
    **{name: getattr(ml_dtypes, name) for name in (
        "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
        "float8_e8m0fnu")},
    "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
}
# Objects that trainers store beside the weights; they are ignored. First names
# from Python and torch, then whole packages.
_INERT = frozenset((
    "_codecs.encode", "argparse.Namespace", "builtins.dict", "builtins.int",
    "builtins.list", "builtins.object", "builtins.set",
    "collections.defaultdict", "copyreg._reconstructor", "pathlib.Path",
    "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath",
    "torch.device", "torch.torch_version.TorchVersion", "typing.Any",
    *(f"torch.{name}" for name in (
        "bfloat16", "bool", "float16", "float32", "float64", "int16", "int32",
        "int64", "int8", "uint8")),
))
_INERT_PACKAGES = ("omegaconf", "pytorch_lightning", "lightning",
                   "lightning_fabric", "numpy")
_SCRIPT_CLASSES, _SCRIPT_LISTS = "__torch__", "torch.jit._pickle."
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def check_counts(name: str, *counts: Any) -> None:
  """Raises ValueError unless all counts are integers >= 0."""
  for n in counts:
    if type(n) is not int or n < 0:
      raise ValueError(f"{name} with {n!r} for a count")


@dataclasses.dataclass
class Storage:
  """A storage of numbers, an entry of the archive."""

  dtype: np.dtype
  key: str
  count: int


@dataclasses.dataclass
class View:
  """A tensor, a view of a storage; offset and strides are in elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _view(
    storage: Storage, offset: int, shape: Any, strides: Any, *_: Any
) -> View:
  """Replaces torch._utils._rebuild_tensor_v2."""
  shape, strides = tuple(shape), tuple(strides)
  if not isinstance(storage, Storage) or len(shape) != len(strides):
    raise pickle.UnpicklingError("a tensor that is no view of a storage")
  check_counts("a tensor", storage.count, offset, *shape, *strides)
  return View(storage, offset, shape, strides)


def _view_of_bytes(
    storage: Storage, offset: int, shape: Any, strides: Any, grad: Any,
    hooks: Any, dtype: Any, *_: Any
) -> View:
  """Replaces torch._utils._rebuild_tensor_v3, used by types of recent years."""
  if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
    raise pickle.UnpicklingError("a tensor that is no view of a storage")
  typed = Storage(dtype, storage.key, storage.count // dtype.itemsize)
  return _view(typed, offset, shape, strides)


class _Ignored:
  """Replaces every object that is not a tensor."""

  def __new__(cls, *args, **kwargs):
    del args, kwargs
    return super().__new__(cls)

  def __init__(self, *args, **kwargs):
    del args, kwargs

  def __call__(self, *args, **kwargs):
    return self

  def __setstate__(self, state):
    del state

  def __setitem__(self, key, value):
    del key, value

  def append(self, value):
    """Ignores the value."""
    del value

  def extend(self, values):
    """Ignores the values."""
    del values

  def __hash__(self):
    return id(self)


class Module:
  """Replaces a module of TorchScript: tensors and modules by attribute."""

  def __init__(self) -> None:
    self._state: dict[str, Any] = {}

  def __setstate__(self, state: Any) -> None:
    if not isinstance(state, dict):
      raise pickle.UnpicklingError("a module without attributes")
    self._state = state

  def tensors(self) -> dict[str, View]:
    """Returns its tensors and those of its parts, named as by a state dict."""
    found: dict[str, View] = {}
    for name, value in self._state.items():
      if isinstance(value, View):
        found[name] = value
      elif isinstance(value, Module):
        found |= {f"{name}.{inner}": x for inner, x in value.tensors().items()}
    return found


class Unpickler(pickle.Unpickler):
  """Reads tensors as views of storages; imports nothing."""

  def __init__(self, data: BinaryIO, file: pathlib.Path | str):
    super().__init__(data, encoding="utf-8")
    self._file = file

  def find_class(self, module: str, name: str) -> Any:
    """Returns the replacement of a global that the pickle names."""
    full = f"{_PYTHON_2.get(module, module)}.{name}"
    if full == "collections.OrderedDict":
      return OrderedDict
    if full == "torch._utils._rebuild_tensor_v2":
      return _view
    if full == "torch._utils._rebuild_tensor_v3":
      return _view_of_bytes
    if full == "torch._utils._rebuild_parameter":
      return lambda data, *_: data
    if full == "torch.Size":
      return tuple
    if full.startswith("torch.") and name in _TORCH_DTYPES:
      return np.dtype(_TORCH_DTYPES[name])
    if full.split(".")[0] == _SCRIPT_CLASSES:
      return Module
    if full.startswith(_SCRIPT_LISTS):
      return _Ignored
    if full in _INERT or full.split(".")[0] in _INERT_PACKAGES:
      return _Ignored
    raise UserError(
        f"Expected weights only, got {self._file}, which asks for {full!r}. "
        "Use this file only if you trust it: save its state dict alone.")

  def persistent_load(self, pid: Any) -> Storage:
    """Returns the storage that a persistent id names."""
    kind, dtype, key, _, count, *view = pid  # legacy files name a view too
    if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
      raise pickle.UnpicklingError(f"unknown storage {pid!r}")
    return Storage(dtype, str(key), count)
