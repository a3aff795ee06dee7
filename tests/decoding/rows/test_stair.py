"""Staircases: the exact one's distribution and tokens, bounds of both."""

import functools

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.decoding.rows.stair import Exact, Stair
from ssd_jax.evaluation import exactness
from tests.support import testkit as kit

_WIDE = dict(rows=2, cols=3, vocab=2)
_ENDED = dict(rows=3, cols=2, vocab=2, end_of_row=True)
_FILTERED = dict(guidance=1.5, top_k=5, top_p=0.9)
_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.quick(1)
@pytest.mark.parametrize("grid, decoder, group", [
    (_WIDE, Exact(), 1),
    (_ENDED, Stair(lookahead=2, drafts="copy", queries=5, row_causal=True), 4),
    _slow(dict(rows=4, cols=2, vocab=2), Exact(rows=2), 4),  # rows wait
    _slow(dict(_ENDED, vocab=3, rows=2, guidance=2.0, top_k=2),
          Exact(drafts="above"), 4),
])
def test_whole_row_ahead_is_lossless(grid, decoder, group):
  """With the row above final, the joint distribution is AR's, in fewer
  passes."""
  pipe = kit.tiny(**grid)
  out = kit.assert_lossless(pipe, decoder, group)
  assert out.passes.mean() < pipe.model.grid.num_tokens


def test_what_is_lossless_is_known_for_a_grid():
  """A lookahead of a row's length is exact; a shorter one is on one row."""
  wide, row = Grid(4, 6), Grid(1, 6)
  for decoder, expected in (
      (Exact(), True), (Stair(), False), (Stair(lookahead=6), True),
      (Stair(lookahead=5), False), (Stair(lookahead=6, sure=0.1), False),
  ):
    assert decoder.is_lossless(wide) is expected
  assert Stair().is_lossless(row)
  assert not Stair(lookahead=6, lenience=0.5).is_lossless(wide)
  assert Stair(lookahead=9).is_lossless(wide)
  assert not Stair(lenience=0.5).is_lossless(row)


@pytest.mark.slow
def test_the_bias_of_a_short_lookahead_is_detected():
  """The same test sees what a lookahead of one token costs."""
  pipe = kit.tiny(**_WIDE)
  out = kit.draw(pipe, Stair(lookahead=1))
  assert kit.p_value(pipe, out.tokens) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("grid, decoder", [
    (dict(rows=4, cols=3, vocab=7),
     Stair(lookahead=3, coupled=True, queries=7)),
    (dict(rows=4, cols=3, vocab=7, end_of_row=True, **_FILTERED),
     Exact(coupled=True, drafts="above")),
])
def test_coupled_gives_the_tokens_of_ar(grid, decoder):
  """With each token's own noise, drafting changes no token."""
  pipe = kit.tiny(**grid)
  out = kit.assert_same_as_ar(pipe, decoder)
  kit.assert_well_recorded(out)
  assert out.passes.mean() < pipe.model.grid.num_tokens


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch():
  """Batch 1 and batch 4 give the same tokens and passes."""
  kit.assert_independent_of_batch(
      kit.chain(5, 4, True), Stair(lookahead=0, rows=9, row_causal=True))


@pytest.mark.slow
def test_sure_tokens_wait_less():
  """Tokens of no entropy need no lookahead, and the bound is shorter by it."""
  model = kit.chain(6, 8, vocab=9)
  steady = kit.run(model, Stair(lookahead=6, rows=6, queries=36), 16)
  hasty = kit.run(
      model, Stair(lookahead=6, rows=6, sure=9.0, queries=36), 16)
  bound = latest_passes(model.grid, Stair(lookahead=0, rows=6))
  assert hasty.passes.mean() < steady.passes.mean()
  assert (hasty.commit_pass <= bound).all()


@pytest.mark.slow
def test_lenience_bounds_every_token():
  """Where whole rows are waited for, no token is 1 / lenience times as probable
  as the model says, given the tokens before it; seen at the last token."""
  pipe = kit.tiny(**_WIDE)
  out = kit.draw(pipe, Stair(lookahead=3, lenience=0.6), 30_000)
  last = lambda counts: counts.reshape(-1, 2) / np.maximum(
      counts.reshape(-1, 2).sum(1, keepdims=True), 1e-9)
  drawn = exactness.count(pipe, out.tokens)
  error = 4 * 0.5 / np.sqrt(np.maximum(drawn.reshape(-1, 2).sum(1), 1))
  bound = last(kit.distribution(pipe)) / 0.6
  assert (last(drawn) <= bound + error[:, None]).all()
  assert (last(drawn) > 1.2 * last(kit.distribution(pipe))).any()


@pytest.mark.slow
def test_defaults_follow_the_grid():
  """Five rows of queries; leniently, which saves passes, but where the
  distribution would else be AR's."""
  model = kit.chain(6, 8, vocab=9)
  plain = kit.run(model, Stair(), 16)
  spelt = kit.run(model, Stair(lookahead=4, lenience=0.6, queries=40), 16)
  np.testing.assert_array_equal(plain.tokens, spelt.tokens)
  np.testing.assert_array_equal(plain.commit_pass, spelt.commit_pass)
  strict = kit.run(model, Stair(lookahead=4, lenience=1.0), 16)
  assert plain.passes.mean() < strict.passes.mean()
  assert Stair(lookahead=8).is_lossless(model.grid)


@pytest.mark.slow
def test_few_queries_cost_passes():
  """However few slots a pass may feed, a token is won in each."""
  model = kit.chain(6, 8, vocab=9)
  out = kit.run(model, Stair(queries=1), 16)
  kit.assert_well_recorded(out)
  assert (out.passes == model.grid.num_tokens).all()


@pytest.mark.slow
def test_passes_are_bounded():
  """A token per row and pass once the rows above are far enough."""
  model = kit.chain(6, 8, vocab=9)
  decoder = Stair(lookahead=1, rows=3, entry=2, queries=3 * 8)
  out = kit.run(model, decoder, 16)
  latest = latest_passes(model.grid, decoder)
  assert (out.commit_pass <= latest).all()
  assert out.passes.max() <= latest[-1, -1] <= model.grid.num_tokens
  kit.assert_well_recorded(out)


def latest_passes(grid, decoder):
  """int [R, C]: the pass at which each token is final at the latest.

  A token of the row above counts in the pass after it became final, unless its
  draft passed; a row starts in the pass after it was drafted.
  """
  last = np.zeros((grid.rows, grid.cols), int)
  for row in range(grid.rows):
    for col in range(grid.cols):
      waits = [0]
      if col:
        waits.append(last[row, col - 1])
      if row:
        ahead = min(grid.cols, col + decoder.lookahead)
        # The first pass that may draft a row is the one after the prefill.
        waits.append(max(2, last[row - 1, max(decoder.entry, 1) - 1]))
        waits.append(last[row - 1, ahead - 1] if ahead else 0)
      if row >= decoder.rows:
        waits.append(last[row - decoder.rows, -1])
      last[row, col] = max(waits) + 1
  return last


@pytest.mark.quick(1)
@pytest.mark.parametrize("rows, cols, end_of_row", [
    (1, 6, False), (6, 1, True), (1, 1, False),
])
def test_single_rows_and_columns(rows, cols, end_of_row):
  """Grids of one row or one column are generated in full, without heads too."""
  model = kit.chain(rows, cols, end_of_row, heads=(0, 0))
  out = kit.run(model, Stair())
  kit.assert_well_recorded(out)
  assert out.passes.max() <= rows * cols


def test_impossible_settings_are_one_line():
  """What cannot be is a UserError, not a crash."""
  for settings in (
      dict(lookahead=-1), dict(rows=0), dict(entry=-1), dict(queries=0),
      dict(sure=-0.1), dict(drafts="guess"), dict(lenience=0.0),
      dict(lenience=1.5), dict(lenience=float("nan")),
      dict(lenience=0.5, coupled=True),
  ):
    with pytest.raises(UserError, match="^Expected .*, got .*$"):
      Stair(**settings)
  model = kit.chain(3, 4, heads=(0, 0))
  for decoder in (
      Stair(entry=5), Exact(lookahead=2), Stair(drafts="heads"),
      Stair(drafts="both"),
  ):
    with pytest.raises(UserError, match="^Expected .*, got "):
      kit.run(model, decoder)
