"""Draft trees: shapes, AR's tokens, the exact distribution, counts, the cut
end."""

import functools

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.trees.eagle import Eagle
from ssd_jax.evaluation import exactness
from ssd_jax.models.drafter import DraftNet
from ssd_jax.pipeline import testing


@functools.cache
def tiny(**kwargs):
  """A pipeline per grid, so that its programs compile once."""
  return testing.tiny(heads=(0, 0), **kwargs)


def draw(pipe, decoder, count=16, **kwargs):
  return pipe.generate(["ab"], decoder, num_images=count, batch=count,
                       **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("grid, decoder, sampling", [
    (dict(vocab=5, rows=3, cols=3, end_of_row=True, guidance=2.0),
     Eagle(drafts="coupled"), dict(top_k=3)),
    (dict(vocab=5, rows=2, cols=4), Eagle("dynamic-8-3-4"), {}),
])
def test_given_drafts_yield_ars_tokens(grid, decoder, sampling):
  """Token for token, in fewer passes; the end and forced slots included."""
  pipe = tiny(**grid)
  expected = draw(pipe, AR(), **sampling)
  out = draw(pipe, decoder, **sampling)
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  assert out.passes.mean() < 0.9 * expected.passes.mean()
  assert out.passes.max() <= pipe.model.grid.num_tokens
  assert (out.commit_pass >= 1).all()
  np.testing.assert_array_equal(out.commit_pass.max((1, 2)), out.passes)


@pytest.mark.slow
def test_sampled_drafts_keep_the_distribution():
  """Chi-square against the enumerated distribution, in groups of four."""
  pipe = tiny(rows=2, cols=2, end_of_row=True, guidance=2.0)
  found = exactness.examine(
      pipe, Eagle("0/1/2/00", "sampled"), "eagle", group=4)
  assert found.lossless and found.is_sound, found
  assert found.passes < pipe.model.grid.num_tokens


@pytest.mark.slow
def test_best_drafts_keep_the_distribution():
  """A dynamic tree of best drafts passes the exactness test too."""
  found = exactness.examine(
      tiny(rows=2, cols=3, guidance=2.0), Eagle(), "eagle", group=4,
      draws=8_000)
  assert found.lossless and found.is_sound, found


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch():
  """Batch 1 and batch 4 give the same images in the same passes."""
  pipe = tiny(rows=2, cols=3, guidance=2.0)
  one, four = (pipe.generate(["ab"], Eagle(), num_images=4, batch=batch)
               for batch in (1, 4))
  np.testing.assert_array_equal(one.tokens, four.tokens)
  np.testing.assert_array_equal(one.commit_pass, four.commit_pass)


@pytest.mark.slow
def test_a_tree_of_every_continuation_is_accepted_whole():
  """Passes: one, then depth + 1 slots each, the last tree being cut."""
  pipe = tiny(vocab=2, rows=3, cols=5)
  out = draw(pipe, Eagle("2-2-2"))
  assert (out.passes == 1 + np.ceil(14 / 4)).all()


def test_what_cannot_work_is_one_line():
  """No drafter, biased combinations and unknown drafts are refused."""
  pipe = tiny(rows=2, cols=3, guidance=2.0)
  bare = pipe.family.generator.model()
  with pytest.raises(UserError, match="without a drafter"):
    Eagle().scratch(bare)
  with pytest.raises(UserError, match="would bias"):
    Eagle(drafts="sampled")
  with pytest.raises(UserError, match="one of top, coupled, sampled"):
    Eagle(drafts="greedy")
  assert DraftNet(pipe.family.generator).cache(2, 3).k.shape[1:4:2] == (2, 9)
