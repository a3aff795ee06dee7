"""A saved pipeline is the one that is loaded; others are refused."""

import jax
import numpy as np
import pytest

import ssd_jax
from ssd_jax.core.config import UserError
from ssd_jax.pipeline import testing


@pytest.fixture(scope="module")
def pipe():
  return testing.tiny(vocab=5, rows=3, cols=4)


@pytest.mark.slow
def test_saved_pipeline_generates_the_same(tmp_path):
  """A saved pipeline loads with the parameters it held, and is whole."""
  pipe = ssd_jax.load("emoji")
  pipe = pipe.with_params(heads=jax.tree.map(
      lambda x: 0.5 * x, pipe.params["heads"]))
  pipe.save(tmp_path / "mine")
  again = ssd_jax.load(tmp_path / "mine")
  for kind in pipe.params:
    np.testing.assert_array_equal(
        *(np.concatenate([np.ravel(x) for x in jax.tree.leaves(p.params[kind])])
          for p in (pipe, again)))
  np.testing.assert_array_equal(
      pipe.decode_images(np.arange(256).reshape(1, 16, 16)),
      again.decode_images(np.arange(256).reshape(1, 16, 16)))
  with pytest.raises(UserError, match="new folder"):
    pipe.save(tmp_path / "mine")
  assert [x.name for x in tmp_path.iterdir()] == ["mine"]


def test_pipeline_that_was_made_says_that_it_has_no_settings(pipe, tmp_path):
  """What came from no folder cannot be written as one; nothing is left."""
  with pytest.raises(UserError, match="loaded from a folder"):
    pipe.save(tmp_path / "tiny")
  assert not list(tmp_path.iterdir())
