"""ZipAR: AR with a whole row, its formula, candidates."""

import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.rows.zipar import ZipAR
from tests.support import testkit as kit


def test_a_window_of_a_row_gives_the_tokens_of_ar():
  """Rows that wait for the whole row above are AR, token for token."""
  decoder = ZipAR(window=5, adaptive=True)
  pipe = kit.tiny(
      rows=3, cols=4, vocab=7, end_of_row=True, guidance=1.5, top_k=5,
      top_p=0.9)
  out = kit.assert_same_as_ar(pipe, decoder)
  assert (out.passes == 12).all()
  assert decoder.is_lossless(pipe.model.grid)
  assert not ZipAR(window=3).is_lossless(pipe.model.grid)


@pytest.mark.quick(1)
@pytest.mark.parametrize("window", [7, 1, 30])
def test_passes_without_row_ends(window):
  """2W + (R - 2) w, the prefill included; AR's from w = W on."""
  out = kit.run(kit.chain(24, 24), ZipAR(window=window), 2)
  assert (out.passes == 2 * 24 + 22 * min(window, 24)).all()
  kit.assert_well_recorded(out)


@pytest.mark.quick(1)
@pytest.mark.parametrize("window", [16, 60])
def test_passes_with_row_ends(window):
  """(R - 1)(w - 1) + W: the token before a row is known in advance."""
  out = kit.run(kit.chain(12, 48, True), ZipAR(window=window), 2)
  assert (out.passes == 11 * (min(window, 49) - 1) + 48).all()


@pytest.mark.quick(1)
@pytest.mark.parametrize("window, published", [(16, 422), (14, 378)])
def test_candidates_that_pass_cost_a_pass_each(window, published):
  """The paper's counts on 24x24, where no window was widened.

  A first token is generated, then tested: 2W + (R - 2)(w + 1).
  """
  out = kit.run(kit.chain(24, 24), ZipAR(window=window, adaptive=True), 2)
  assert (out.passes == published).all()


@pytest.mark.slow
def test_the_bias_of_a_short_window_is_detected():
  """A row that has not seen the end of the one above has another
  distribution."""
  pipe = kit.tiny(rows=3, cols=2, vocab=2)
  out = kit.draw(pipe, ZipAR(window=1))
  assert kit.p_value(pipe, out.tokens) < 1e-3


@pytest.mark.slow
def test_candidates_widen_the_window():
  """Adaptive rows start a pass later at the earliest; never later than AR."""
  pipe = kit.tiny(rows=5, cols=6, vocab=7, end_of_row=True, heads=(0, 0))
  fixed = kit.draw(pipe, ZipAR(window=3), 16)
  out = kit.draw(pipe, ZipAR(window=3, adaptive=True), 16)
  kit.assert_well_recorded(out)
  assert (out.passes > fixed.passes).all()
  assert out.passes.max() > out.passes.min()
  assert (out.passes <= 30).all()


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch():
  """Batch 1 and batch 4 give the same tokens and passes."""
  kit.assert_independent_of_batch(kit.chain(5, 4, vocab=9), ZipAR(2, True))


@pytest.mark.quick(1)
@pytest.mark.parametrize("rows, cols, adaptive", [
    (6, 1, True), (1, 6, False),
])
def test_single_rows_and_columns(rows, cols, adaptive):
  """Grids of one row or one column take AR's passes."""
  out = kit.run(kit.chain(rows, cols), ZipAR(adaptive=adaptive))
  kit.assert_well_recorded(out)
  assert (out.passes == rows * cols).all()


def test_impossible_windows_are_one_line():
  """No window, or none beyond the token before the row, is a UserError."""
  with pytest.raises(UserError, match="window=0"):
    ZipAR(window=0)
  with pytest.raises(
      UserError, match="Expected window to be >= 2.*, got window=1"):
    kit.run(kit.chain(3, 4, True), ZipAR(window=1))
