"""MTP: exact with prefix verification, AR's tokens when coupled, counts."""

import functools

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.mtp import MTP
from ssd_jax.evaluation import exactness
from ssd_jax.pipeline import testing

tiny = functools.cache(testing.tiny)


@pytest.mark.slow
def test_exact_verification_is_lossless():
  """The joint distribution of the output is AR's: chi-square over every
  image."""
  pipe = tiny(rows=3, vocab=2, end_of_row=True)
  finding = exactness.examine(pipe, MTP(horizontal=3), "mtp", group=4)
  assert finding.lossless and finding.p_value > exactness.P_VALUE
  assert finding.passes < pipe.model.grid.num_tokens


@pytest.mark.slow
def test_the_bias_of_correction_is_detected():
  """The same test sees the bias of correcting every draft on its own."""
  finding = exactness.examine(tiny(), MTP(verify="correct"), "mtp")
  assert not finding.lossless and finding.p_value < exactness.P_VALUE


@pytest.mark.slow
def test_coupled_gives_the_tokens_of_ar():
  """With each slot's own noise, drafting changes no token."""
  pipe = tiny(vocab=7, rows=4, cols=3, end_of_row=True, guidance=1.5)
  decoder = MTP(verify="coupled", cross_rows=True)
  prompts = ["a", "bc", "d"]
  expected = pipe.generate(prompts, AR(), num_images=4, batch=12)
  out = pipe.generate(prompts, decoder, num_images=4, batch=12)
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  assert out.passes.mean() < expected.passes.mean()


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch():
  """Batch 1 and batch 4 give the same tokens and passes, which grow along the
  raster from 1."""
  pipe = tiny(vocab=5, rows=3, cols=4, end_of_row=True)
  prompts = ["a", "bc", "d", "e"]
  one, four = (pipe.generate(prompts, MTP(), batch=batch) for batch in (1, 4))
  np.testing.assert_array_equal(one.tokens, four.tokens)
  np.testing.assert_array_equal(one.passes, four.passes)
  np.testing.assert_array_equal(one.commit_pass, four.commit_pass)
  commits = one.commit_pass.reshape(4, -1)
  assert (commits[:, 0] == 1).all() and (np.diff(commits) >= 0).all()
  np.testing.assert_array_equal(commits[:, -1], one.passes)


@pytest.mark.quick(1)
@pytest.mark.parametrize("rows, cols, end_of_row, cross_rows, passes", [
    (24, 24, False, True, 231),
    (3, 90, True, False, 3 * 37),
])
def test_correction_counts_passes_as_published(
    rows, cols, end_of_row, cross_rows, passes
):
  """Two passes per five tokens: 576 / 231 = 2.49 on 24x24 without row ends.

  With row ends the published baseline starts anew in each row and spends a pass
  on its end (22 a row of 48, 38 a row of 90); ours lets it ride along.
  """
  pipe = tiny(rows=rows, cols=cols, end_of_row=end_of_row)
  decoder = MTP(verify="correct", cross_rows=cross_rows)
  out = pipe.generate(["a"], decoder)
  assert out.passes.tolist() == [passes]


@pytest.mark.slow
def test_more_rounds_cost_as_many_passes():
  """A group of K tokens costs rounds + 1 passes."""
  decoder = MTP(horizontal=4, verify="correct", rounds=3)
  out = tiny(rows=3, cols=4).generate(["a"], decoder)
  assert out.passes.tolist() == [1 + 3 * (3 + 1)]


@pytest.mark.slow
def test_impossible_settings_are_one_line():
  """What heads cannot do is a UserError, not a crash."""
  with pytest.raises(UserError, match="verify"):
    MTP(verify="maybe")
  with pytest.raises(UserError, match="at most the 2"):
    tiny(heads=(2, 1)).generate(["a"], MTP(horizontal=3))
  with pytest.raises(UserError, match="without horizontal heads"):
    tiny(heads=(0, 0)).generate(["a"], MTP())
