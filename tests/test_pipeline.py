"""What a user holds: progress pass by pass, saving, decoders by name."""

import json

import jax
import numpy as np
import pytest

import ssd_jax
from ssd_jax import loading, testing
from ssd_jax.config import UserError


@pytest.fixture(scope="module")
def pipe():
  return testing.tiny(vocab=5, rows=3, cols=4)


def test_every_pass_is_told(pipe):
  """A listener sees each pass once, and the last grid is what is returned."""
  said = []
  out = pipe.generate(["a", "b", "c"], batch=2, on_pass=said.append)
  assert [p.passes for p in said] == 2 * list(range(1, 13))
  assert [len(p.index) for p in said] == 12 * [2] + 12 * [1]
  assert [p.is_final.sum() for p in said[:12]] == list(range(2, 26, 2))
  np.testing.assert_array_equal(said[11].tokens, out.tokens[:2])
  np.testing.assert_array_equal(said[-1].tokens[0], out.tokens[2])
  assert said[0].share == pytest.approx(1 / 12) and said[-1].share == 1


def test_another_listener_compiles_nothing_and_silence_is_free(pipe):
  """Listeners share a program; a call without one runs another, as before."""
  first, second = [], []
  pipe.generate(["a"], on_pass=first.append)
  programs = len(pipe._executables)
  listened = pipe.generate(["a"], on_pass=second.append)
  assert len(pipe._executables) == programs and len(first) == len(second) == 12
  silent = pipe.generate(["a"])
  np.testing.assert_array_equal(silent.tokens, listened.tokens)
  assert len(first) == len(second) == 12


def test_decoders_by_name_and_pictures_by_index(pipe):
  """A text names a decoder; a list of indices picks the pictures of a call."""
  named = pipe.generate(["a"] * 4, "sjd:window=3")
  made = pipe.generate(["a"] * 4, ssd_jax.SJD(window=3), batch=4)
  np.testing.assert_array_equal(named.tokens, made.tokens)
  picked = pipe.generate(["a"] * 3, "sjd:window=3", first_image=[3, 0, 2],
                         batch=2)
  np.testing.assert_array_equal(picked.tokens, made.tokens[[3, 0, 2]])
  with pytest.raises(UserError, match="first_image"):
    pipe.generate(["a"] * 3, first_image=[1, 2])


def test_saved_pipeline_draws_the_same(tmp_path):
  """A saved pipeline loads with the parameters it held, and is whole."""
  pipe = ssd_jax.load("emoji")
  pipe.params["heads"] = jax.tree.map(
      lambda x: 0.5 * x, pipe.params["heads"])
  pipe.save(tmp_path / "mine")
  again = ssd_jax.load(tmp_path / "mine")
  for kind in pipe.params:
    np.testing.assert_array_equal(
        *(np.concatenate([np.ravel(x) for x in jax.tree.leaves(p.params[kind])])
          for p in (pipe, again)))
  np.testing.assert_array_equal(
      pipe.draw_tokens(np.arange(256).reshape(1, 16, 16)),
      again.draw_tokens(np.arange(256).reshape(1, 16, 16)))
  with pytest.raises(UserError, match="new folder"):
    pipe.save(tmp_path / "mine")
  assert [x.name for x in tmp_path.iterdir()] == ["mine"]


def test_pipeline_that_was_made_says_that_it_has_no_settings(pipe, tmp_path):
  """What came from no folder cannot be written as one; nothing is left."""
  with pytest.raises(UserError, match="made, not loaded"):
    pipe.save(tmp_path / "tiny")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [
    lambda x: x.pop("config"), lambda x: x.pop("words"),
    lambda x: x.update(family=["x"]), lambda x: x["config"].pop("trunk")])
def test_a_damaged_model_json_is_one_line(tmp_path, change):
  """Settings that lack something are refused before weights are read."""
  settings = json.loads((loading.EMBEDDED / "model.json").read_text())
  change(settings)
  (tmp_path / "model.json").write_text(json.dumps(settings))
  with pytest.raises(UserError, match="model.json") as error:
    ssd_jax.load(tmp_path)
  assert "\n" not in str(error.value)
