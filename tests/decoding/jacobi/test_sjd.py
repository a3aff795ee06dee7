"""SJD and its successors: their distribution, their counts, what they reduce
to."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.decoding import engine
from ssd_jax.decoding.jacobi import initial_drafts
from ssd_jax.decoding.jacobi.sjd import SJD, Continuation, Coupled
from ssd_jax.decoding.sampling import Sampling
from tests.support import testkit as kit

FILTERED = dict(guidance=2.0, top_k=2, top_p=0.95)


def small(end_of_row, **sampling):
  """Grids whose images can be enumerated."""
  return kit.tiny(2, 3, 3, end_of_row, (0, 0), **sampling)


def larger(**sampling):
  """Grids on which windows move on at different speeds."""
  return kit.tiny(3, 4, 5, True, (0, 0), **sampling)


@pytest.mark.quick(1)
@pytest.mark.parametrize("decoder, end_of_row, sampling, group", [
    (SJD(4), False, {}, 1),
    (Coupled(4, "repeat_above"), True, {}, 4),
    (Continuation(4, "sample_above"), True, FILTERED, 4),
    (SJD(2, "repeat_left", tail="reference"), True, {}, 4),
], ids=str)
def test_lossless(decoder, end_of_row, sampling, group):
  """The distribution of whole images is AR's, generated one by one or four at a
  time, whatever the initialisation and the tail."""
  kit.assert_lossless(small(end_of_row, **sampling), decoder, group)


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch():
  """Each image goes at its own speed: batches of 1 and 4 give the same."""
  kit.assert_independent_of_batch(
      kit.chain(4, 4, True, vocab=5), Continuation(5))


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [
    SJD(1), SJD(4, "repeat_above", acceptance="equality")], ids=str)
def test_equals_ar(decoder):
  """A window of one, and equality Jacobi, give AR's tokens token by token."""
  pipe = larger(**FILTERED)
  out = kit.assert_same_as_ar(pipe, decoder, 16)
  assert (out.passes <= pipe.model.grid.num_tokens).all()
  assert decoder.window == 1 or out.passes.mean() < pipe.model.grid.num_tokens


@pytest.mark.slow
def test_continuation_is_maximal_coupling():
  """The rules of two publications are one algorithm, token for token."""
  model = kit.chain(4, 4, True, vocab=5)
  ours = kit.run(model, Continuation(5), 32)
  theirs = kit.run(model, Coupled(5, coupling="maximal"), 32)
  np.testing.assert_array_equal(ours.tokens, theirs.tokens)
  np.testing.assert_array_equal(ours.commit_pass, theirs.commit_pass)


@pytest.mark.slow
def test_reference_tail_goes_one_by_one():
  """The published tail gives each of the last W + 2 slots its own pass."""
  model, window = kit.chain(4, 4, True), 3
  out = kit.run(model, SJD(window, tail="reference"), 32)
  grid = model.grid
  in_tail = grid.slot_of.ravel() >= grid.length - window - 2
  commit = out.commit_pass.reshape(32, -1)
  assert (np.diff(commit[:, in_tail], axis=1) == 1).all()
  assert (np.diff(commit[:, ~in_tail], axis=1) == 0).any()


def test_passes_are_bounded():
  """A pass ends at least one token and at most W; forced slots cost none."""
  out = kit.run(kit.chain(4, 4, True, vocab=5), Continuation(5), 32)
  assert out.tokens.min() >= 0 and out.tokens.max() < 5
  assert (np.diff(out.commit_pass.reshape(32, -1), axis=1) <= 1).all()
  assert out.passes.mean() < 16 and (out.passes >= 1 + 15 / 5).all()
  kit.assert_well_recorded(out)


def first(init, last, slots, end_of_row=True):
  """(drafts, tokens) of fresh slots on a 3 x 3 grid of 50 codes."""
  model = types.SimpleNamespace(grid=Grid(3, 3, end_of_row), vocab=50)
  sampling = Sampling.make()
  ctx = engine.Context(
      jax.random.key(0), jnp.int32(0), jax.random.key(4), {}, sampling, model)
  tokens_N = 10 + jnp.arange(model.grid.length)
  q_QV = jax.nn.one_hot(20 + jnp.array(slots), 50)
  return initial_drafts.draft_first(
      ctx, init, jnp.array(slots), jnp.int32(last), tokens_N, q_QV)


@pytest.mark.parametrize("init, last, slots, expected", [
    ("repeat_left", 4, [5, 6, 7, 8], [14, 14, None, None]),
    ("repeat_left", 1, [2, 3, 4], [11, None, None]),
    ("repeat_above", 4, [5, 6, 7, 8, 9], [11, 12, None, 14, 11]),
    ("repeat_above", 1, [2, 4, 5], [None, 10, 11]),
    ("sample_left", 4, [5, 6, 8], [25, 26, None]),
    ("sample_above", 4, [5, 6, 2], [25, 26, None]),
    ("random", 4, [5, 6], [None, None]),
])
def test_initial_drafts(init, last, slots, expected):
  """Fresh slots copy or sample the nearest known neighbour, else are random.

  Slots 3 and 7 end rows; a neighbour beyond `last` is looked for further on.
  """
  drafts = first(init, last, slots)
  for i, (slot, token) in enumerate(zip(slots, expected, strict=True)):
    if slot % 4 == 3:
      continue
    assert 0 <= drafts.tokens[i] < 50
    assert bool(drafts.is_point[i]) == (
        token is not None and init.startswith("repeat"))
    if token is not None:
      assert drafts.tokens[i] == token
    else:
      np.testing.assert_allclose(drafts.q[i], 1 / 50)


@pytest.mark.parametrize("make", [
    lambda: SJD(0), lambda: SJD(init="left"), lambda: Coupled(tail="short"),
    lambda: Coupled(coupling="none"), lambda: SJD(acceptance="loose"),
    lambda: Continuation(-1),
])
def test_bad_settings_end_in_one_line(make):
  """An impossible setting is the user's mistake, reported in one line."""
  with pytest.raises(UserError, match="^Expected .*got") as error:
    make()
  assert "\n" not in str(error.value)
