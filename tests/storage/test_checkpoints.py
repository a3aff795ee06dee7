"""Checkpoints of parameters are whole or absent, and damage is noticed."""

import os
import random
import resource
import shutil
import subprocess
import sys

import chex
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.pipeline.model_folder import EMBEDDED
from ssd_jax.storage import checkpoints
from tests.support import ROOT
from tests.support.damage import damaged


def test_checkpoints_of_parameters_are_whole_or_absent(tmp_path):
  """save() replaces by rename; restore() gives the same arrays, or one line."""
  tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)},
          "c": np.int32(4)}
  checkpoints.save(tmp_path / "x", tree)
  checkpoints.save(tmp_path / "x", tree, np.float16)
  restored = checkpoints.restore(tmp_path / "x")
  np.testing.assert_array_equal(restored["a"]["b"], tree["a"]["b"])
  assert restored["a"]["b"].dtype == np.float16 and restored["c"] == 4
  assert os.listdir(tmp_path) == ["x"]
  with pytest.raises(UserError, match="got no checkpoint"):
    checkpoints.restore(tmp_path / "nowhere")


def test_a_flipped_bit_is_found(tmp_path):
  """Weights that differ from their checksum do not load."""
  folder = tmp_path / "vq"
  shutil.copytree(EMBEDDED / "vq", folder)
  assert set(checkpoints.restore(folder)) >= {"codebook", "decoder"}
  largest = max((p for p in folder.rglob("*") if p.is_file()),
                key=lambda path: path.stat().st_size)
  blob = bytearray(largest.read_bytes())
  blob[len(blob) // 2] ^= 1
  largest.write_bytes(blob)
  with pytest.raises(UserError, match="got a damaged checkpoint"):
    checkpoints.restore(folder)


@pytest.mark.quick(2)
@pytest.mark.parametrize("seed", range(20))
def test_any_damage_is_one_line_or_none(tmp_path, capfd, seed):
  """The arrays are those saved, or an error names the folder; nothing else,
  such as orbax' own words, is printed."""
  rng, folder = random.Random(seed), tmp_path / "x"
  tree = {"a": {"b": np.arange(6.0)}, "c": np.ones((3, 2), np.float32)}
  checkpoints.save(folder, tree)
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  capfd.readouterr()
  for file in rng.sample(files, 5):
    data = file.read_bytes()
    file.write_bytes(damaged(data, rng.choice(files).read_bytes(), rng))
    try:
      chex.assert_trees_all_equal(checkpoints.restore(folder), tree)
    except UserError as error:
      assert str(folder) in str(error) and "\n" not in str(error)
    file.write_bytes(data)
  assert capfd.readouterr().err == ""


def _save_on_a_full_disk(folder):
  """Body of a process whose files may not grow beyond 20,000 bytes."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
  checkpoints.save(folder, {
      f"x{i}": np.random.default_rng(i).normal(size=9000) for i in range(40)})


def test_a_full_disk_is_one_error(tmp_path):
  """However many writes fail; nothing is left of them."""
  child = subprocess.run(
      [sys.executable, "-c", "import sys\nfrom tests.storage import "
       "test_checkpoints as t\nt._save_on_a_full_disk(sys.argv[1])",
       tmp_path / "saved"], cwd=ROOT, capture_output=True, text=True)
  assert child.returncode == 1
  assert "Event loop is closed" not in child.stderr
  assert not os.listdir(tmp_path)
