"""Pickles are read without executing anything, or refused in one line."""

import pickle
import zipfile

import numpy as np
import pytest

from ssd_jax.convert import tensors
from ssd_jax.core.config import UserError


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
