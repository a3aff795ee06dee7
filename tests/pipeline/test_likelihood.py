"""Per-token NLL and entropy agree with the joint log-probability."""

import functools

import numpy as np
import pytest

from ssd_jax.evaluation import metrics
from ssd_jax.pipeline import testing

PROMPTS = ("red heart", "cat", "no emoji", "dog", "x")


@functools.cache
def tiny():
  return testing.tiny(vocab=5, rows=3, cols=4, heads=(0, 0), guidance=2.0)


def test_nll_is_that_of_the_unfiltered_joint_distribution():
  """Summed over tokens it is -log p; filters do not enter; batches neither."""
  pipe = tiny()
  out = pipe.generate(PROMPTS[:3], batch=3)
  nll, entropy = pipe.nll(out.tokens, PROMPTS[:3], batch=2)
  np.testing.assert_allclose(
      nll.sum((1, 2)), -pipe.log_prob(out.tokens, PROMPTS[:3]), rtol=1e-4)
  assert (entropy >= 0).all() and (entropy <= np.log(5) + 1e-5).all()
  filtered, _ = pipe.nll(out.tokens, PROMPTS[:3], top_k=1, top_p=0.5)
  np.testing.assert_allclose(filtered, nll, atol=1e-5)
  other, _ = pipe.nll(out.tokens, PROMPTS[:3], guidance=1.0)
  assert np.abs(other - nll).max() > 0.1
  np.testing.assert_array_equal(pipe.decode_images(out.tokens, 2), out.images)


@pytest.mark.slow
def test_excess_of_ar_is_zero():
  """Surprisal minus entropy of AR's own samples vanishes within its error."""
  pipe = tiny()
  texts = [PROMPTS[0]] * 400
  out = pipe.generate(texts, batch=400)
  nll, entropy = pipe.nll(out.tokens, texts, batch=400)
  flat = lambda x: x.reshape(len(x), -1)
  excess = metrics.excess(flat(nll), flat(entropy))
  assert abs(excess.value) < 4 * excess.error < 0.2
