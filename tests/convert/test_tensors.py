"""Files of published checkpoints, sound and damaged; no PyTorch needed."""

import argparse
from collections import OrderedDict
import json

import ml_dtypes
import numpy as np
import pytest

from ssd_jax.convert import checkpoint_files, checks, recipes, tensors
from ssd_jax.core.config import UserError
from tests.support.torch_files import Storage, Tensor
from tests.support.toy_weights import write_safetensors


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
          turned=Tensor(Storage(data), 2, (3, 4), (1, 3)),
          plain=Tensor(Storage(half), 0, (2, 2), (2, 1))),
      "args": argparse.Namespace(lr=1.0), "steps": 3})
  found = tensors.read_file(file)
  assert set(found) == {"turned", "plain"}
  expected = data[2:14].reshape(4, 3).T
  np.testing.assert_array_equal(found["turned"].read(), expected)
  np.testing.assert_array_equal(found["turned"].read(1, 3), expected[1:3])
  np.testing.assert_array_equal(found["plain"].read(1, 2), [[2, 3]])


@pytest.mark.parametrize("wrap", [
    lambda model, other: {"model": model, "rng_state": other},
    lambda model, other: {"module": model, "global_step": other},
    lambda model, other: {"ema": model, "optimizer": {"state": other}},
    lambda model, other: {"model": model, "ema": {"c": other}},
    lambda model, other: {"state_dict": {"model": model, "x": other}}])
def test_tensors_beside_a_wrapper_do_not_hide_it(torch_file, wrap):
  """The model is what the wrapper holds, whatever a trainer put beside it."""
  data = Storage(np.zeros(12, np.float32))
  tensor = lambda: Tensor(data, 0, (3, 4), (4, 1))
  file = torch_file(wrap(OrderedDict(a=tensor(), b=tensor()), tensor()))
  assert set(tensors.read_file(file)) == {"a", "b"}


@pytest.mark.parametrize("offset, shape, strides", [
    (-5, (3,), (1,)), (0, (3, 4), (1,)), (0, (-3, -4), (4, 1)),
    (20, (3,), (-1,)), (0, (3,), (1.0,)), (20, (3, 4), (4, 1)),
    (0, (True,), (1,))])
def test_impossible_views_are_refused(torch_file, offset, shape, strides):
  """A tensor lies inside its storage, in whole steps forward."""
  storage = Storage(np.zeros(24, np.float32))
  file = torch_file({"a": Tensor(storage, offset, shape, strides)})
  with pytest.raises(UserError, match="damaged"):
    tensors.read_file(file)


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


def test_a_dict_of_unknown_keys_is_named(torch_file):
  """No guess: the keys that are there are said."""
  tensor = Tensor(Storage(np.zeros(1, np.float32)), 0, (1,), (1,))
  with pytest.raises(UserError, match="with 'netG', 'step' in it"):
    tensors.read_file(torch_file({"netG": {"a": tensor}, "step": 3}))


def test_float8_is_named_not_called_damaged(tmp_path):
  """A quantised checkpoint is refused by the dtype of its tensors."""
  header = json.dumps({"x": {
      "dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
  file = tmp_path / "x.safetensors"
  file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  part = recipes.Part("source", (), recipes.Table(
      (recipes.Row("a", (recipes.Source("x", (4,)),)),)), {})
  found = checkpoint_files.open_checkpoint(file, ())
  with pytest.raises(UserError, match="got x in F8_E4M3 in .*x.safetensors"):
    checks.check_dtypes(part, found)
