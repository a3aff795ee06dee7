"""PJD: exact where rows follow each other, masks, progress."""

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.rows.pjd import PJD
from tests.support import testkit as kit


@pytest.mark.slow
def test_rows_one_after_the_other_are_lossless():
  """With the whole row as context only the top row is drafted: exact."""
  pipe = kit.tiny(rows=2, cols=3, vocab=2, end_of_row=True, guidance=2.0)
  out = kit.assert_lossless(pipe, PJD(context=3, window=2))
  assert not PJD(context=1).is_lossless(pipe.model.grid)
  assert out.passes.mean() < pipe.model.grid.num_tokens


@pytest.mark.slow
def test_the_bias_of_an_early_row_is_detected():
  """The same test sees rows that start before the one above ends."""
  pipe = kit.tiny(rows=2, cols=3, vocab=2)
  out = kit.draw(pipe, PJD(context=1))
  assert kit.p_value(pipe, out.tokens) < 1e-3


@pytest.mark.quick(1)
@pytest.mark.parametrize("end_of_row, decoder", [
    (False, PJD(context=3, row_causal=False)), (True, PJD(window=1)),
    (False, PJD(context=1, keep=True)),
])
def test_rows_advance_and_never_overtake(end_of_row, decoder):
  """The top row wins a token in every pass; no row overtakes the one above,
  and its first token is final only after `context` tokens above it."""
  model = kit.chain(6, 7, end_of_row, vocab=9)
  out = kit.run(model, decoder, 16)
  kit.assert_well_recorded(out)
  assert out.passes.max() <= model.grid.num_tokens
  assert (np.diff(out.commit_pass, axis=2) >= 0).all()
  assert (np.diff(out.commit_pass, axis=1) >= 0).all()
  above = out.commit_pass[:, :-1, (decoder.context or 1) - 1]
  assert (out.commit_pass[:, 1:, 0] > above).all()


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch():
  """Batch 1 and batch 4 give the same tokens and passes."""
  kit.assert_independent_of_batch(kit.chain(5, 4, vocab=9), PJD(keep=True))


@pytest.mark.quick(1)
@pytest.mark.parametrize("rows, cols, end_of_row", [
    (6, 1, True), (1, 6, False),
])
def test_single_rows_and_columns(rows, cols, end_of_row):
  """Grids of one row or one column are generated in full."""
  out = kit.run(kit.chain(rows, cols, end_of_row), PJD())
  kit.assert_well_recorded(out)
  assert out.passes.max() <= rows * cols


def test_impossible_settings_are_one_line():
  """No window, no context, or one longer than the row is a UserError."""
  with pytest.raises(UserError, match="window=0"):
    PJD(window=0)
  with pytest.raises(UserError, match="context=0"):
    PJD(context=0)
  with pytest.raises(
      UserError, match="Expected context to be at most 4.*, got context=5"):
    kit.run(kit.chain(3, 4), PJD(context=5))
