"""LANTERN, LANTERN++ and CASCADE: what each moves from the target's
distribution, how much, and that EAGLE's tokens come out when nothing moves."""

import dataclasses
import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.trees.eagle import Eagle, Siblings
from ssd_jax.decoding.trees.relaxed import (
  Cascade,
  Lantern,
  LanternPP,
  neighbour_table,
)
from ssd_jax.evaluation import exactness
from ssd_jax.models.codebook_search import unit
from ssd_jax.pipeline import testing

WIDE = "0/1/2/00/01/000"
P = [0.1, 0.2, 0.3, 0.4]


@functools.cache
def tiny():
  """A guided pipeline."""
  return testing.tiny(rows=2, cols=3, heads=(0, 0), guidance=2.0)


def draw(decoder, count=64):
  return tiny().generate(["ab"], decoder, num_images=count, batch=count)


def on_a_line(decoder, p, child):
  """What a child takes of p where the codes 0, 1, 2 .. lie on a line."""
  codes = np.arange(len(p), dtype=np.float32)[:, None] * 1.01 ** np.arange(2)
  table = neighbour_table(codes + 1e-3 * codes**2, len(p) - 1)
  family = Siblings(
      jnp.arange(3), jnp.array([child, 0, 0]), jnp.array([True, False, False]),
      jnp.zeros((3, 1)), jnp.zeros(1), None)
  ctx = types.SimpleNamespace(
      params={"neighbours": jnp.asarray(table)},
      model=types.SimpleNamespace(vocab=len(p)))
  return decoder._relax(ctx, jnp.asarray(p), family)


def test_the_table_lists_the_nearest_first():
  """Neighbours by distance, never the code itself."""
  codes = np.array([[0.0, 1.0], [0.0, 3.0], [0.5, 1.0], [9.0, 0.0]])
  np.testing.assert_array_equal(
      neighbour_table(codes, 3), [[2, 1, 3], [0, 2, 3], [0, 1, 3], [2, 0, 1]])


@pytest.mark.slow
@pytest.mark.parametrize("has_codebook", [True, False])
def test_a_pipeline_makes_the_table_when_it_is_asked_for(has_codebook):
  """From the codebook or the input table, once, and only if it is needed."""
  pipe = tiny()
  codes = unit(pipe.vq_params["codebook"])  # its tokenizer compares directions
  if not has_codebook:
    pipe = dataclasses.replace(pipe, vq_params=None)
    codes = pipe.model.embed(pipe.params, jnp.arange(3))
  for decoder in (Eagle(), Lantern(neighbours=0)):
    assert "neighbours" not in pipe.programs.params_for(decoder)
  table = pipe.programs.params_for(Lantern())["neighbours"]
  np.testing.assert_array_equal(table, neighbour_table(codes, 2))
  assert pipe.programs.params_for(LanternPP())["neighbours"] is table


def test_lantern_moves_at_most_delta():
  """The nearest codes' mass, as long as its sum stays within delta."""
  p = [0.1, 0.2, 0.3, 0.05, 0.35]
  # Nearest to 1: 0 (.1), 2 (.3), 3, 4.
  moved = on_a_line(Lantern(delta=0.15), p, 1)
  np.testing.assert_allclose(moved, [0, 0.3, 0.3, 0.05, 0.35], atol=1e-6)
  moved = on_a_line(Lantern(delta=0.46), p, 1)
  np.testing.assert_allclose(moved, [0, 0.65, 0, 0, 0.35], atol=1e-6)
  moved = on_a_line(Lantern(neighbours=1, delta=0.46), p, 1)
  np.testing.assert_allclose(moved, [0, 0.3, 0.3, 0.05, 0.35], atol=1e-6)


def test_lanternpp_moves_at_most_a_multiple():
  """The bound is (multiplier - 1) p; an excluded child takes nothing."""
  p = [0.1, 0.2, 0.3, 0.05, 0.35]
  moved = on_a_line(LanternPP(multiplier=1.6), p, 1)
  np.testing.assert_allclose(moved, [0, 0.3, 0.3, 0.05, 0.35], atol=1e-6)
  np.testing.assert_allclose(
      on_a_line(LanternPP(multiplier=1.4), p, 1), p, atol=1e-6)
  p = [0.5, 0.0, 0.5, 0.0, 0.0]
  np.testing.assert_allclose(on_a_line(Lantern(delta=0.9), p, 1), p)


@pytest.mark.slow
@pytest.mark.parametrize("relaxed", [
    LanternPP(WIDE, multiplier=1 + 1e-7), Cascade(WIDE, "sampled", 1.0, 2.0)])
def test_bounds_that_let_nothing_move_are_eagle(relaxed):
  """The relaxed code path itself gives EAGLE's tokens and passes."""
  exact = Eagle(WIDE, "sampled")
  assert not relaxed.lossless and exact.lossless
  one, other = draw(relaxed), draw(exact)
  np.testing.assert_array_equal(one.tokens, other.tokens)
  np.testing.assert_array_equal(one.passes, other.passes)


@pytest.mark.parametrize("decoder", [
    Lantern(delta=0.0), Lantern(neighbours=0), LanternPP(neighbours=0),
    LanternPP(multiplier=1.0), Cascade(tau_position=1.01, tau_sequence=1.01),
])
def test_nothing_to_move_is_lossless(decoder):
  """k = 0, delta = 0, a multiplier of 1 and thresholds above 1 claim EAGLE's
  distribution."""
  assert decoder.lossless


@pytest.mark.slow
def test_relaxing_saves_passes_and_is_detected():
  """Fewer passes than EAGLE; the exactness test sees that the distribution is
  another."""
  relaxed = LanternPP(WIDE, neighbours=2, multiplier=3.0)
  found = exactness.examine(tiny(), relaxed, relaxed.name, draws=4000)
  assert not found.lossless and found.p_value < exactness.P_VALUE
  assert found.passes < draw(Eagle(WIDE, "sampled")).passes.mean()


def test_bad_settings_are_one_line():
  """Thresholds out of range, too many neighbours, a missing table."""
  with pytest.raises(UserError, match="got delta=2"):
    Lantern(delta=2.0)
  with pytest.raises(UserError, match="got multiplier=0.5"):
    LanternPP(multiplier=0.5)
  with pytest.raises(UserError, match="got delta=nan"):
    Lantern(delta=float("nan"))
  with pytest.raises(UserError, match="got drafts='coupled'"):
    Lantern(drafts="coupled")  # its bound would not hold
  assert Lantern(drafts="coupled", delta=0.0).lossless
  with pytest.raises(UserError, match="below the 3 tokens"):
    Lantern(neighbours=7).scratch(tiny().model)
  with pytest.raises(UserError, match="without a table"):
    bare = types.SimpleNamespace(params={})
    Lantern()._nearest(bare, jnp.ones(3) / 3, jnp.int32(0), 0.1)


def relax(p=P, **thresholds):
  """The target after three children: codes 0, 2, 3, states at 0, 10, 90
  degrees, the parent's at 80."""
  angles = jnp.radians(jnp.array([0.0, 10.0, 90.0, 80.0]))
  states = jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1) * 3.0
  family = Siblings(
      jnp.arange(3), jnp.array([0, 2, 3]), jnp.ones(3, bool), states[:3],
      states[3], None)
  return Cascade(**thresholds)._relax(None, jnp.asarray(p), family)


def test_interchangeable_siblings_give_their_mass_to_the_first():
  """Across the breadth, the better of two alike drafts stands for both."""
  np.testing.assert_allclose(
      relax(tau_position=0.98, tau_sequence=2.0), [0.4, 0.2, 0, 0.4],
      atol=1e-6)
  np.testing.assert_allclose(
      relax(tau_position=0.99, tau_sequence=2.0), P, atol=1e-6)


def test_a_converged_draft_takes_what_its_better_siblings_left():
  """Along the depth, a draft like its parent passes; siblings go first."""
  np.testing.assert_allclose(
      relax(tau_position=2.0, tau_sequence=0.98), [0.1, 0, 0.3, 0.6],
      atol=1e-6)
  np.testing.assert_allclose(
      relax(tau_position=0.98, tau_sequence=0.98), [0.4, 0, 0, 0.6],
      atol=1e-6)


def test_an_excluded_draft_takes_nothing():
  """What the target's filters exclude stays excluded, however alike."""
  np.testing.assert_allclose(
      relax([0.5, 0.5, 0.0, 0.0], tau_position=2.0, tau_sequence=0.98),
      [0.5, 0.5, 0.0, 0.0])


@pytest.mark.slow
def test_each_relaxation_alone_saves_passes():
  """Never more passes than EAGLE; convergence everywhere accepts the tree."""
  tree = (WIDE, "sampled")
  exact = draw(Eagle(*tree)).passes.mean()
  position = draw(Cascade(*tree, 0.0, 2.0)).passes.mean()
  sequence = draw(Cascade(*tree, 2.0, -1.0)).passes.mean()
  assert position < exact
  # Five slots after the first, at most four per pass: always two passes more.
  assert sequence == 3.0


def test_thresholds_that_are_no_numbers_are_one_line():
  """NaN, infinity and text are refused; a number of numpy's is one."""
  for bad in (float("nan"), float("inf"), "0.9", None):
    with pytest.raises(UserError, match=f"got tau_position={bad!r}"):
      Cascade(tau_position=bad)
  assert not Cascade(tau_position=np.float32(0.5)).lossless
