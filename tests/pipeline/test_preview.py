"""Models that generate a preview first, then the image."""

import functools

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.evaluation import exactness
from ssd_jax.pipeline import model_folder, preview, testing
from ssd_jax.pipeline.pipeline import Pipeline
from tests.support.toy_families import glm_image_config

DRAWS = 6_000


@functools.cache
def pipe():
  """A random model whose preview and image have 2 x 1 tokens of 4 values."""
  config = glm_image_config()
  config.size = "32x64"
  config.trunk.update(vocab_in=300, vocab_out=4, n_layers=1)
  config.sampling.update(temperature=1.0, top_p=1.0)
  found = model_folder.from_config(config)
  trunk = dict(found.params["trunk"])
  trunk["embedding"] = 30.0 * trunk["embedding"]
  return found.with_params(trunk=trunk)


@functools.cache
def joint():
  """Exact probabilities of each image after each preview, [256]."""
  found = pipe()
  first = Pipeline(found.family, found.params, None,
                   preview.model_of(found.model))
  grids = testing.every_image(first)
  texts = ["ab"] * len(grids)
  log_p = first.log_prob(grids, texts)
  after = [found.log_prob(grids, texts, np.repeat(one[None], len(grids), 0))
           for one in grids]
  return np.exp(log_p[:, None] + np.stack(after)).ravel().astype(np.float64)


@pytest.mark.quick(1)
@pytest.mark.parametrize("decoder", ["exact", "sjd", "ar"])
def test_previews_and_images_are_distributed_as_ars(decoder):
  """Chi-square of pairs of grids against their enumerated probabilities."""
  found, p = pipe(), joint()
  assert p.sum() == pytest.approx(1, abs=1e-3)
  out = found.generate(["ab"], decoder, num_images=DRAWS, batch=DRAWS)
  pairs = np.concatenate([out.preview, out.tokens], axis=1)
  assert exactness.chi_square(
      exactness.count(found, pairs), p / p.sum()) > 1e-3
  assert (out.commit_pass.max((1, 2)) == out.passes).all()


def test_a_batch_does_not_change_its_images():
  """The same seed gives the same grids, however the call is batched."""
  texts = ["ab", "c", "other"]
  whole, parts = (pipe().generate(texts, "ar", seed=3, batch=n) for n in (3, 2))
  np.testing.assert_array_equal(whole.tokens, parts.tokens)
  np.testing.assert_array_equal(whole.preview, parts.preview)
  assert whole.images.shape == (3, 0, 0, 3)


@pytest.mark.parametrize("call, word", [
    (lambda p: p.generate(["a"], guidance=3.0), "guidance"),
    (lambda p: p.generate(["a"], trace=True), "trace"),
    (lambda p: p.generate(["a"], prefix=np.zeros((1, 1), int)), "prefix"),
    (lambda p: p.stream(["a"]), "stream"),
    (lambda p: p.nll(np.zeros((1, 2, 1), int), ["a"]), "nll"),
    (lambda p: p.log_prob(np.zeros((1, 2, 1), int), ["a"]), "previews")])
def test_what_such_a_model_does_not_do_is_one_line(call, word):
  """Guidance, traces, prefixes, streams, scores without a preview."""
  with pytest.raises(UserError, match=word):
    call(pipe())
