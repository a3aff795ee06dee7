"""The comparison with transformers, on a trunk of a moment."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ssd_jax.decoding.ar import AR
from ssd_jax.performance.transformers_baseline import (
  OurDecoders,
  Setting,
  TransformersBaseline,
)
from tests.support import ROOT


def test_both_sides_generate_the_same_greedy_tokens():
  """One set of weights: our AR and transformers agree, token for token."""
  setting = Setting(2, 64, 16, 50, 25, 7, 2, "float32", seed=3)
  theirs = TransformersBaseline(setting)
  drawn, ours = (
    theirs.generate(False),
    OurDecoders(setting, theirs).generate(AR(), 0.0),
  )
  np.testing.assert_array_equal(ours.tokens, drawn.tokens)
  assert ours.tokens.shape == (2, 25) and ours.passes == drawn.passes == 25
  assert len(np.unique(ours.tokens)) > 5


def test_bfloat16_weights_are_read_as_they_are():
  """The two bytes of each weight arrive."""
  setting = Setting(1, 32, 16, 20, 4, 3, 1, "bfloat16")
  theirs = TransformersBaseline(setting)
  embedding = OurDecoders(setting, theirs).params["trunk"]["embedding"]
  expected = theirs.model.state_dict()["model.embed_tokens.weight"]
  assert embedding.dtype == "bfloat16"
  np.testing.assert_array_equal(
      np.asarray(embedding, np.float32), expected.float().numpy())


@pytest.mark.slow
def test_command_writes_both_tables(tmp_path):
  """Rows of both kinds, ratios to our AR, equal tokens; nothing left over."""
  done = subprocess.run(
      [sys.executable, "-m", "infer.compare", "--layers=2", "--width=64",
       "--vocab=50", "--tokens=16", "--rounds=1", "--loops=sjd:window=4",
       f"--out={tmp_path}"],
      cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert sorted(x.name for x in tmp_path.iterdir()) == [
      "results.json", "table.md"]
  rows = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert [row["compares"] for row in rows] == ["token"] * 3 + ["pass"]
  assert rows[0]["ratio"]["median"] == 1 and rows[1]["equal_tokens"] == 1
  assert rows[2]["unavailable"] or rows[2]["milliseconds"]["median"] > 0
  assert rows[3]["queries"] == 4
