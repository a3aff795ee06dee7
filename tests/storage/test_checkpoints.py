"""Checkpoints of parameters are whole or absent, and damage is noticed."""

import os
import shutil

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.pipeline.model_folder import EMBEDDED
from ssd_jax.storage import checkpoints


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
