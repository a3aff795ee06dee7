"""Files of published checkpoints, sound and damaged; no PyTorch needed."""

import argparse
from collections import OrderedDict
import io
import json
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ssd_jax.convert import tensors
from ssd_jax.core.config import UserError
from tests.support.toy_weights import write_safetensors


class _Storage:
  """What a pickled tensor refers to."""

  def __init__(self, array):
    self.array = array


class _Tensor:
  """A view of a storage, pickled as torch pickles tensors."""

  def __init__(self, storage, offset, shape, strides):
    self.args = (storage, offset, shape, strides, False, OrderedDict())

  def __reduce__(self):
    return sys.modules["torch._utils"]._rebuild_tensor_v2, self.args


def _global(module, name):
  def function(*args):
    raise AssertionError(f"{module}.{name} was called")

  function.__module__, function.__qualname__ = module, name
  function.__name__ = name
  return function


@pytest.fixture
def torch_file(tmp_path, monkeypatch):
  """Writes an object with tensors as torch.save does."""
  root, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  for kind in ("FloatStorage", "BFloat16Storage"):
    setattr(root, kind, _global("torch", kind))
  utils._rebuild_tensor_v2 = _global("torch._utils", "_rebuild_tensor_v2")
  monkeypatch.setitem(sys.modules, "torch", root)
  monkeypatch.setitem(sys.modules, "torch._utils", utils)

  def write(value, name="model.pt"):
    data, storages = io.BytesIO(), []

    class Pickler(pickle.Pickler):
      def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
          return None
        storages.append(obj.array)
        kind = ("BFloat16Storage" if obj.array.dtype == ml_dtypes.bfloat16
                else "FloatStorage")
        return ("storage", getattr(root, kind), str(len(storages) - 1), "cpu",
                obj.array.size)

    Pickler(data, protocol=2).dump(value)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
      archive.writestr("model/data.pkl", data.getvalue())
      for i, array in enumerate(storages):
        archive.writestr(f"model/data/{i}", array.tobytes())
    return tmp_path / name

  return write


def test_safetensors_are_read_in_pieces(tmp_path):
  """Values, types and row ranges are those written."""
  arrays = {"a": np.arange(12, dtype=np.float32).reshape(4, 3),
            "b": np.ones((2, 5), ml_dtypes.bfloat16)}
  write_safetensors(tmp_path / "x.safetensors", arrays)
  found = tensors.read_file(tmp_path / "x.safetensors")
  assert found["b"].read().dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found["a"].read(1, 3), arrays["a"][1:3])


def test_torch_files_are_read_without_torch(torch_file):
  """Views, wrappers and a trainer's leftovers are understood."""
  data = np.arange(24, dtype=np.float32)
  half = np.arange(4).astype(ml_dtypes.bfloat16)
  file = torch_file({
      "model": OrderedDict(
          turned=_Tensor(_Storage(data), 2, (3, 4), (1, 3)),
          plain=_Tensor(_Storage(half), 0, (2, 2), (2, 1))),
      "args": argparse.Namespace(lr=1.0), "steps": 3})
  found = tensors.read_file(file)
  assert set(found) == {"turned", "plain"}
  expected = data[2:14].reshape(4, 3).T
  np.testing.assert_array_equal(found["turned"].read(), expected)
  np.testing.assert_array_equal(found["turned"].read(1, 3), expected[1:3])
  np.testing.assert_array_equal(found["plain"].read(1, 2), [[2, 3]])


def test_pickles_are_not_executed(torch_file, tmp_path):
  """A pickle that asks for a system call is refused by name."""

  class Attack:
    def __reduce__(self):
      return eval, (f"open({str(tmp_path / 'pwned')!r}, 'w')",)

  file = torch_file({"model": {"x": Attack()}})
  with pytest.raises(UserError, match="builtins.eval"):
    tensors.read_file(file)
  assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("module, name", [
    ("torch.hub", "load"), ("torch", "load"), ("collections", "namedtuple"),
    ("builtins", "setattr"), ("builtins", "getattr"), ("os", "system")])
def test_nothing_but_known_names_passes(tmp_path, module, name):
  """What only resembles a harmless name is refused by its own."""
  data = f"c{module}\n{name}\n(tR.".encode()  # GLOBAL, no arguments, REDUCE
  with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
    archive.writestr("model/data.pkl", data)
  with pytest.raises(UserError, match=f"{module}.{name}"):
    tensors.read_file(tmp_path / "model.pt")


@pytest.mark.parametrize("wrap", [
    lambda model, other: {"model": model, "rng_state": other},
    lambda model, other: {"module": model, "global_step": other},
    lambda model, other: {"state_dict": {"model": model, "x": other}}])
def test_tensors_beside_a_wrapper_do_not_hide_it(torch_file, wrap):
  """The model is what the wrapper holds, whatever a trainer put beside it."""
  data = _Storage(np.zeros(12, np.float32))
  tensor = lambda: _Tensor(data, 0, (3, 4), (4, 1))
  file = torch_file(wrap(OrderedDict(a=tensor(), b=tensor()), tensor()))
  assert set(tensors.read_file(file)) == {"a", "b"}


@pytest.mark.parametrize("offset, shape, strides", [
    (-5, (3,), (1,)), (0, (3, 4), (1,)), (0, (-3, -4), (4, 1)),
    (20, (3,), (-1,)), (0, (3,), (1.0,)), (20, (3, 4), (4, 1)),
    (0, (True,), (1,))])
def test_impossible_views_are_refused(torch_file, offset, shape, strides):
  """A tensor lies inside its storage, in whole steps forward."""
  storage = _Storage(np.zeros(24, np.float32))
  file = torch_file({"a": _Tensor(storage, offset, shape, strides)})
  with pytest.raises(UserError, match="damaged"):
    tensors.read_file(file)


def _pickles():
  """Bytes that are no pickle of weights."""
  sound = pickle.dumps({f"k{i}": list(range(9)) for i in range(4)}, 2)
  random = np.random.default_rng(0)
  for _ in range(300):
    data = bytearray(sound)
    for at in random.integers(len(data), size=3):
      data[at] = random.integers(256)
    yield bytes(data)
  yield b"\x80\x07."  # a protocol of the future
  yield b"\x80\x02X\x01\x00\x00\x00\xd7."  # no UTF-8
  yield b"\x8e" + (2**62).to_bytes(8, "little") + b"."  # more than memory
  yield b"}q\x00X\x05\x00\x00\x00modelh\x00s."  # a dictionary in itself


def test_damaged_pickles_are_one_line(tmp_path):
  """Whatever the bytes are, a file without weights is a line, no traceback."""
  for data in _pickles():
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
      archive.writestr("model/data.pkl", data)
    with pytest.raises(UserError) as error:
      tensors.read_file(tmp_path / "model.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", [
    {"shape": [-1, -2], "data_offsets": [0, 8]},
    {"shape": [2.0], "data_offsets": [0, 8]},
    {"shape": [2], "data_offsets": [-8, 0]}, {"shape": [2]}, [],
    {"shape": "2", "data_offsets": [0, 8]}])
def test_damaged_headers_are_one_line(tmp_path, entry):
  """Shapes and offsets of safetensors are counts."""
  if isinstance(entry, dict):
    entry = {"dtype": "F32", **entry}
  header = json.dumps({"x": entry}).encode()
  file = tmp_path / "x.safetensors"
  file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
  with pytest.raises(UserError, match="damaged") as error:
    tensors.read_file(file)
  assert "\n" not in str(error.value)
