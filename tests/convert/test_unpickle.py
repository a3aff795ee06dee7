"""Pickles are read without executing anything, or refused in one line."""

import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from ssd_jax.convert import tensors
from ssd_jax.core.config import UserError
from tests.support.torch_files import Storage, Tensor


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


def _script_module(kind, **attributes):
  """A module as TorchScript pickles it, of a class that is nowhere."""
  known = sys.modules["__torch__.net"]
  setattr(known, kind, type(kind, (), {"__module__": known.__name__}))
  module = getattr(known, kind)()
  module.__dict__.update(attributes)
  return module


def test_modules_of_torchscript(torch_file, monkeypatch):
  """Tensors of torch.jit.save are named by the path of their attributes."""
  for name in ("__torch__", "__torch__.net"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  weight = np.arange(6, dtype=np.float32)
  tensor = Tensor(Storage(weight), 0, (2, 3), (3, 1))
  inner = _script_module("Conv", weight=tensor, training=False, bias=None)
  file = torch_file(_script_module("Net", conv_in=inner))
  found = tensors.read_file(file)
  assert list(found) == ["conv_in.weight"]
  np.testing.assert_array_equal(
      found["conv_in.weight"].read(), weight.reshape(2, 3))


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
