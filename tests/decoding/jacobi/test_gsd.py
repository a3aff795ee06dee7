"""GSD: SJD with clusters of one, fewer passes with clusters of more."""

import functools

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.jacobi.gsd import GSD
from ssd_jax.decoding.jacobi.sjd import SJD
from tests.support import testkit as kit


@functools.cache
def draw(decoder):
  """(tokens, passes) of 32 guided images of 4 x 4 tokens and 12 codes."""
  pipe = kit.tiny(
      4, 4, 12, end_of_row=True, heads=(0, 0), guidance=2.0, top_k=8)
  out = kit.draw(pipe, decoder, 32)
  return out.tokens, out.passes


@pytest.mark.slow
def test_clusters_save_passes():
  """Clusters of any tokens accept more drafts, so that passes fall."""
  decoder = GSD(6, group=12, max_gap=1.0, max_distance=1e9)
  _, passes = draw(decoder)
  assert not decoder.lossless
  assert passes.mean() < draw(SJD(6))[1].mean()


def test_distant_codes_stay_out():
  """With no distance allowed every cluster is its draft, as in SJD: the same
  tokens in the same passes."""
  for one, other in zip(
      draw(GSD(6, max_distance=0.0)), draw(SJD(6)), strict=True):
    np.testing.assert_array_equal(one, other)
  assert GSD(group=1).lossless


def test_cluster_beyond_the_vocabulary_is_an_error():
  """Explicit clusters that cannot be are refused; the default is clamped."""
  with pytest.raises(UserError, match="Expected .*12.*got group=13"):
    draw(GSD(6, group=13))
  assert GSD().group > 12


@pytest.mark.parametrize("setting", [
    {"group": 0}, {"max_gap": -0.1}, {"max_distance": -1.0}, {"window": 0}])
def test_bad_settings_end_in_one_line(setting):
  """An impossible setting is the user's mistake, reported in one line."""
  with pytest.raises(UserError, match="^Expected .*got"):
    GSD(**setting)
