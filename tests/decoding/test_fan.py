"""Guesses of resampled tokens: they save passes and change no probability."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.types import Queries
from ssd_jax.decoding import fan as fan_lib
from ssd_jax.decoding.jacobi.sjd import SJD, Coupled
from ssd_jax.decoding.rows.stair import Exact, Stair
from ssd_jax.evaluation import exactness
from tests.support import testkit as kit

_WIDE = dict(rows=2, cols=3, vocab=3)
_ENDED = dict(rows=3, cols=2, vocab=2, end_of_row=True)


def test_guesses_are_the_next_best_under_the_noise():
  """The draft, which is fed anyway, is left out; noise counts as much as q."""
  q_1V = jnp.array([[0.4, 0.3, 0.2, 0.1]])
  noise_1V = jnp.array([[0.0, 0.0, 2.0, 0.0]])
  fan = fan_lib.guess(jnp.array([5]), jnp.array([0]), q_1V, noise_1V, 2)
  np.testing.assert_array_equal(fan.tokens, [[2, 1]])
  token, guess = fan.resample(jnp.array([[0.0, 0.9, 0.05, 0.0]]))
  assert (token[0], guess[0]) == (1, 1)
  token, guess = fan.resample(jnp.array([[0.0, 0.0, 0.0, 1.0]]))
  assert (token[0], guess[0]) == (3, 2)  # not among the two


def test_a_guess_sees_what_its_slot_sees_and_writes_elsewhere():
  """All but the draft that it stands for; unfed slots have inactive guesses."""
  length = 6
  slots = jnp.array([1, 2, 3, length])  # the last query is inactive
  queries = Queries(
      jnp.arange(4), slots, slots, jnp.arange(length) <= slots[:, None])
  fan = fan_lib.Fan(
      jnp.array([2, 5]), jnp.array([[7, 8], [9, 9]]), jnp.zeros((2, 9)))
  added = jax.tree.map(lambda x: x[4:], fan_lib.append(queries, fan))
  np.testing.assert_array_equal(added.tokens, [7, 8, 9, 9])
  np.testing.assert_array_equal(added.positions, [2, 2, 5, 5])
  np.testing.assert_array_equal(added.slots, [6, 7, 10, 10])
  np.testing.assert_array_equal(
      added.visible[0], [1, 1, 0, 0, 0, 0] + [1, 0, 0, 0])
  np.testing.assert_array_equal(
      added.visible[1], [1, 1, 0, 0, 0, 0] + [0, 1, 0, 0])
  main = fan_lib.append(queries, fan)
  np.testing.assert_array_equal(main.slots[:4], [1, 2, 3, 10])
  assert not main.visible[:4, length:].any()


@pytest.mark.slow
@pytest.mark.parametrize("grid, decoder, group", [
    (_ENDED, Exact(fan=2), 4),
    (dict(_WIDE, guidance=2.0, top_k=2), Coupled(4, fan=2), 4),
], ids=str)
def test_lossless(grid, decoder, group):
  """The distribution of whole images is AR's, one by one or four at a time."""
  kit.assert_lossless(kit.tiny(**grid), decoder, group)


@pytest.mark.slow
def test_a_fan_that_forgets_the_residual_is_detected(monkeypatch):
  """Resampled from p instead, the draft's tokens come too often."""
  pipe = kit.tiny(**_WIDE)
  monkeypatch.setattr(
      "ssd_jax.decoding.rows.guesses.acceptance.residual",
      lambda p_QV, drafts: p_QV)
  decoder = dataclasses.replace(Exact(fan=3), entry=2)  # compiled by no other
  out = exactness.sample_images(pipe, decoder, 20_000)
  assert kit.p_value(pipe, out.tokens) < 1e-6


@pytest.mark.slow
def test_coupled_gives_the_tokens_of_ar():
  """With the slots' own noise the guesses change no token, and save passes."""
  decoder = SJD(5, acceptance="equality", fan=4)
  pipe = kit.tiny(rows=4, cols=3, vocab=7, end_of_row=True)
  out = kit.assert_same_as_ar(pipe, decoder)
  kit.assert_well_recorded(out)
  alone = kit.draw(pipe, dataclasses.replace(decoder, fan=1), 12)
  assert out.passes.mean() < alone.passes.mean()


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch():
  """Batch 1 and batch 4 give the same tokens and passes."""
  kit.assert_independent_of_batch(
      kit.chain(5, 4, True, vocab=9), Stair(fan=4))


@pytest.mark.parametrize("decoder", [Exact(fan=4), SJD(4, fan=4)], ids=str)
def test_more_guesses_than_codes_are_refused(decoder):
  """One line that names the vocabulary."""
  with pytest.raises(UserError, match="fan to be at most 3.*got fan=4"):
    decoder.scratch(kit.chain(2, 2, vocab=3))
  with pytest.raises(UserError, match="fan to be >= 1, got fan=0"):
    type(decoder)(fan=0)
