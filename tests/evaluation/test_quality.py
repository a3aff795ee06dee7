"""Quality against AR and real images: gaps, distances, recall, verdicts."""

import numpy as np
import pytest

from ssd_jax.data.sources import EmojiSource
from ssd_jax.evaluation import metrics, quality
from ssd_jax.evaluation.benchmark import Run
from ssd_jax.evaluation.metrics import Estimate, Gap
from ssd_jax.evaluation.quality import Quality, References


def fake_run(images=4, **changes):
  """A run of made-up figures."""
  values = dict(
      images=np.zeros((images, 4, 4, 3), np.uint8),
      tokens=np.zeros((images, 2, 3), np.int32),
      passes=np.full(images, 3), commit_pass=np.ones((images, 2, 3), int),
      seconds=np.full(images, 0.5), nll=np.arange(images) / 4.0,
      entropy=np.zeros(images), memory=np.full(images, -1),
      session=np.zeros(images, int))
  return Run(**{**values, **changes})


def quality_of(gap, extra, kid=None):
  interval = (gap - 0.1, gap + 0.1)
  return Quality(1.0, Gap(gap, interval), Estimate(0.0, 0.1),
                 Estimate(extra, 0.05), kid_ar=kid and Estimate(kid, 0.01))


@pytest.mark.parametrize("decoder,rerun,is_rerun,expected", [
    ((0.05, 0.0), (0.02, 0.0), False, True),
    ((-0.11, 0.09), (0.02, 0.0), False, True),
    ((0.13, 0.0), (0.02, 0.0), False, False),
    ((-0.13, 0.0), (0.02, 0.0), False, False),
    ((0.0, 0.11), (0.02, 0.0), False, False),
    ((0.0, 0.0, 0.05), (0.0, 0.0, 0.01), False, False),
    ((0.0, 0.0, 0.03), (0.0, 0.0, 0.01), False, True),
    ((0.0, 0.0, 0.05), (0.0, 0.0), False, True),
    ((0.02, 0.0), (0.02, 0.0), True, True),
    ((0.2, 0.0), (0.2, 0.0), True, False),
])
def test_within_ars_own_spread(decoder, rerun, is_rerun, expected):
  """Gap, excess and KID are held against the second AR run's, both ways."""
  got = quality.is_within_spread(
      quality_of(*decoder), quality_of(*rerun), is_rerun)
  assert got is expected


def test_quality_is_taken_prompt_by_prompt():
  """Images of a prompt are averaged; the first AR is the zero of gaps."""
  ar = fake_run(4)
  worse = fake_run(4, nll=ar.nll + 0.5)
  none = References(None, None, None, np.full(4, -1))
  found = quality.assess([worse, ar, worse], 1, 2, 2, None, none)
  assert found[0].gap.value == pytest.approx(0.5)
  assert found[0].gap.interval == pytest.approx((0.5, 0.5))
  assert found[0].extra.value == pytest.approx(0.5)
  assert found[1].gap == Gap(0.0, (0.0, 0.0)) and found[1].within_ar is None
  assert found[0].within_ar is True and found[2].within_ar is False
  assert found[0].fd_ar is None and found[0].recall is None
  lone = quality.assess([worse], None, None, 1, None, none)
  assert lone[0].gap is None and lone[0].within_ar is None


def test_features_give_distances_and_recall():
  """FD and KID to real images and to AR's; ranks of named prompts only."""
  rng = np.random.default_rng(0)
  gallery = rng.normal(size=(6, 3))
  targets = np.array([2, -1, 4, 5])
  own = gallery[[2, 0, 4, 0]]
  references = References(gallery, np.arange(6), gallery, targets)
  got = quality.assess(
      [fake_run(), fake_run()], 0, None, 1, [gallery[:4], own], references)
  assert got[0].fd_ar is None and got[0].fd_real > 0
  assert got[1].fd_ar == pytest.approx(
      metrics.frechet_distance(own, gallery[:4]))
  assert got[1].recall == pytest.approx(2 / 3)


def test_captions_and_targets():
  """Held-out captions come first; a caption finds its own emoji."""
  captions = quality.emoji_captions(None)
  held = quality.emoji_captions("validation")
  assert captions[:len(held)] == held and len(captions) > 1800
  assert not set(held) & set(quality.emoji_captions("train"))
  place, none = quality.emoji_targets([f" {held[0]}\n", "no such emoji"])
  assert EmojiSource("all").records[place].label == held[0] and none == -1
