"""CASCADE: which drafts stand for which, and when none does."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.trees.eagle import Eagle, Family
from ssd_jax.decoding.trees.relaxed import Cascade
from ssd_jax.pipeline import testing

WIDE = "0/1/2/00/01/000"
P = [0.1, 0.2, 0.3, 0.4]


@functools.cache
def tiny():
  """A guided pipeline."""
  return testing.tiny(rows=2, cols=3, heads=(0, 0), guidance=2.0)


def draw(decoder, count=64):
  return tiny().generate(["ab"], decoder, num_images=count, batch=count)


def relax(p=P, **thresholds):
  """The target after three children: codes 0, 2, 3, states at 0, 10, 90
  degrees, the parent's at 80."""
  angles = jnp.radians(jnp.array([0.0, 10.0, 90.0, 80.0]))
  states = jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1) * 3.0
  family = Family(
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


@pytest.mark.parametrize("tree", [("dynamic", "top"), (WIDE, "sampled")])
def test_thresholds_that_none_reaches_are_eagle(tree):
  """The relaxed code path gives EAGLE's tokens; above 1 claims to be it."""
  assert Cascade(*tree, 1.01, 1.01).lossless
  relaxed = Cascade(*tree, 1.0, 2.0)
  assert not relaxed.lossless
  one, other = draw(relaxed), draw(Eagle(*tree))
  np.testing.assert_array_equal(one.tokens, other.tokens)
  np.testing.assert_array_equal(one.passes, other.passes)


def test_each_relaxation_alone_and_both_save_passes():
  """Never more passes than EAGLE; convergence everywhere accepts the tree."""
  tree = (WIDE, "sampled")
  exact = draw(Eagle(*tree)).passes.mean()
  position = draw(Cascade(*tree, 0.0, 2.0)).passes.mean()
  sequence = draw(Cascade(*tree, 2.0, -1.0)).passes.mean()
  both = draw(Cascade(*tree, 0.0, 0.5)).passes.mean()
  assert position < exact and both < exact
  # Five slots after the first, at most four per pass: always two passes more.
  assert sequence == 3.0


def test_thresholds_that_are_no_numbers_are_one_line():
  """NaN, infinity and text are refused; a number of numpy's is one."""
  for bad in (float("nan"), float("inf"), "0.9", None):
    with pytest.raises(UserError, match=f"got tau_position={bad!r},"):
      Cascade(tau_position=bad)
  assert not Cascade(tau_position=np.float32(0.5)).lossless
