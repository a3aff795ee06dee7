"""Images whose first rows are given are completed as AR would."""

import functools

import numpy as np
import pytest
import scipy.stats

from ssd_jax.core.config import UserError
from ssd_jax.pipeline import testing

DRAWS = 4_000


@functools.cache
def tiny(end_of_row):
  return testing.tiny(vocab=3, rows=3, cols=2, guidance=2.0,
                      end_of_row=end_of_row, heads=(2, 1))


@pytest.fixture
def pipe():
  return tiny(True)


def conditional(pipe, prefix):
  """Exact probabilities of all images with these first rows."""
  images = testing.every_image(pipe)
  images = images[(images[:, :len(prefix)] == prefix).all((1, 2))]
  log_p = pipe.log_prob(images, ["ab"] * len(images)).astype(np.float64)
  p = np.exp(log_p - log_p.max())
  return images, p / p.sum()


@pytest.mark.quick(1)
@pytest.mark.parametrize("decoder, rows, end_of_row", [
    ("ar", 1, True), ("exact", 1, False), ("eagle:tree=2-1", 1, True)])
def test_the_rest_is_distributed_as_ars(decoder, rows, end_of_row):
  """Chi-square of draws against the enumerated conditional distribution."""
  pipe = tiny(end_of_row)
  prefix = np.array([[0, 2], [1, 1]])[:rows]
  images, p = conditional(pipe, prefix)
  out = pipe.generate(["ab"], decoder, num_images=DRAWS, batch=DRAWS,
                      prefix=prefix)
  assert (out.tokens[:, :rows] == prefix).all()
  assert (out.commit_pass[:, :rows] == 1).all() and out.passes.max() <= 6
  match = (out.tokens[:, None] == images).all((2, 3))
  counts = match.sum(0).astype(float)
  assert counts.sum() == DRAWS
  rare = p * DRAWS < 5
  pool = lambda x: np.append(x[~rare], x[rare].sum()) if rare.any() else x
  assert scipy.stats.chisquare(
      pool(counts), pool(p) * DRAWS).pvalue > 1e-3


@pytest.mark.slow
def test_greedy_completion_of_an_own_image_is_that_image(pipe):
  """Each decoder's greedy image, cut after a row, is completed to itself; each
  image has a prefix of its own, whatever the batch."""
  texts = ["ab", "c", "other"]
  whole = pipe.generate(texts, "ar", temperature=0.0, batch=3)
  again = pipe.generate(texts, "exact", temperature=0.0, batch=2, trace=True,
                        prefix=whole.tokens[:, :1])
  np.testing.assert_array_equal(again.tokens, whole.tokens)
  np.testing.assert_array_equal(again.images, whole.images)
  assert again.history.shape[2:] == (3, 2)


@pytest.mark.parametrize("prefix", [
    np.zeros((3, 2), int), np.zeros((0, 2), int), np.zeros((1, 3), int),
    np.full((1, 2), 3), np.full((1, 2), -1), np.zeros((1, 2)),
    np.zeros((2, 1, 2), int)])
def test_rows_of_another_grid_are_one_line(pipe, prefix):
  """Too many, none, too wide, codes of another model, for other images."""
  with pytest.raises(UserError, match="Expected .*prefix"):
    pipe.generate(["a"], prefix=prefix)
