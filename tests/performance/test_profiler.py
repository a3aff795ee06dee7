"""infer.benchmark --profile, on a model of a moment."""

import json

import jax
import jax.numpy as jnp
from PIL import Image
import pytest

from ssd_jax.cli import profile
from ssd_jax.performance import profiler, roofline
from ssd_jax.pipeline import testing


@pytest.fixture(scope="module")
def pipe():
  """A model with heads and a tokenizer."""
  return testing.tiny(vocab=3, rows=3, cols=3, guidance=2.0)


@pytest.mark.slow
def test_everything_is_written(pipe, tmp_path, capsys):
  """Figures, a table with a line per number of queries, a plot, a trace."""
  profile.profile(pipe, "ab", 1, tmp_path, queries=(4,))
  assert "pass / least" in capsys.readouterr().out
  found = json.loads((tmp_path / "profile.json").read_text())
  [row] = found["rows"]
  assert row["queries"] == 4 and set(row["parts"]) == set(profiler.PARTS)
  assert row["whole"] > 0 and row["least"] > 0
  assert row["rest"] == pytest.approx(row["whole"] - sum(
      row["parts"][k] for k in profiler.PARTS if k != "drafting"))
  assert (tmp_path / "profile.md").read_text().count("\n| 4 |") == 1
  assert Image.open(tmp_path / "profile.png").size[0] > 400
  assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_models_without_heads_below_draft_to_the_right():
  """Drafting is timed by whichever heads there are, or not at all."""
  times = [
      profiler.Profiler(testing.tiny(heads=heads), "ab", 1).row(2)
      .parts["drafting"] for heads in ((2, 0), (0, 0))]
  assert times[0] > 0 and times[1] is None


def test_bytes_of_a_pass_are_weights_and_cache_once(pipe):
  """Counted by hand: all of the trunk but the input table, keys and values."""
  moved, weights = profiler.Profiler(pipe, "ab", 2).counts
  cfg = pipe.family.generator.cfg
  sizes = {k: sum(x.size for x in jax.tree.leaves(v))
           for k, v in pipe.params["trunk"].items()}
  assert weights == sum(sizes.values()) - sizes["embedding"]
  slots = 8 + 9
  assert moved == 4 * (
      weights + 2 * cfg.n_layers * 4 * cfg.n_kv_heads * slots * cfg.head_dim)


def test_a_part_takes_the_best_of_its_calls():
  """The machine's figures are positive; a slower program takes longer."""
  machine = roofline.measure_machine(2**16, jnp.float32)
  assert min(machine.bandwidth, machine.flops, machine.dispatch) > 0
  x = jnp.ones((256, 256))
  once, often = (
      jax.jit(lambda x, n=n: jax.lax.fori_loop(0, n, lambda _, y: y @ x, x))
      for n in (1, 60))
  seconds = [roofline.seconds_of(lambda f=f: f(x), 0.0) for f in (once, often)]
  assert seconds[1] > 5 * seconds[0]
