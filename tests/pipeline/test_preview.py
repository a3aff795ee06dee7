"""Models that generate a preview first, then the image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Prompt
from ssd_jax.decoding import engine, registry
from ssd_jax.decoding.rows.stair import Exact
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.evaluation import exactness
from ssd_jax.pipeline import model_folder, preview, testing
from ssd_jax.pipeline.pipeline import Pipeline
from tests.support import testkit
from tests.support.toy_families import glm_image_config

DRAWS = 6_000
_slow = functools.partial(pytest.param, marks=pytest.mark.slow)
DRAFTED = ("exact:drafts=preview", "sjd:init=preview", "ssd:drafts=preview")


@functools.cache
def pipe():
  """A random model whose preview and image have 2 x 2 tokens of 2 values."""
  config = glm_image_config()
  config.size = "64x64"
  config.trunk.update(vocab_in=300, vocab_out=2, n_layers=1)
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
@pytest.mark.parametrize("decoder", [
    "exact:drafts=preview", _slow("sjd:init=preview+window=3"), _slow("ar"),
    _slow("stair:drafts=preview+lookahead=2+fan=2"), _slow("exact"),
    _slow("continuation:init=preview")])
def test_previews_and_images_are_distributed_as_ars(decoder):
  """Chi-square of pairs of grids against their enumerated probabilities."""
  p_value, out = chi_square(decoder)
  print(decoder, p_value, out.passes.mean())
  assert p_value > exactness.P_VALUE
  assert (out.commit_pass.max((1, 2)) == out.passes).all()
  assert decoder == "ar" or out.passes.mean() < 8


def chi_square(decoder):
  """Returns (p-value of pairs of grids, what was generated)."""
  found, p = pipe(), joint()
  assert p.sum() == pytest.approx(1, abs=1e-3)
  out = found.generate(["ab"], decoder, num_images=DRAWS, batch=DRAWS)
  pairs = np.concatenate([out.preview, out.tokens], axis=1)
  return exactness.chi_square(
      exactness.count(found, pairs), p / p.sum()), out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetful(Exact):
  """Tests the preview's tokens as if they were samples; biased."""

  name = "forgetful"

  def start(self, ctx, p_V, hidden_GD):
    state = super().start(ctx, p_V, hidden_GD)
    return state.replace(q=jnp.broadcast_to(p_V, state.q.shape))


@pytest.mark.slow
def test_the_test_sees_a_forgotten_point_mass():
  """The control: drafts tested with another q than their own."""
  assert chi_square(Forgetful(drafts="preview"))[0] < 1e-6


@pytest.mark.quick(1)
def test_the_image_is_drafted_by_its_preview():
  """Every decoder with such drafts begins with the preview, upsampled."""
  small = np.array([[[1, 0]], [[0, 1]]])
  prompt = Prompt(*(jnp.zeros((2, n), int) for n in (3, 3, 10)))
  grid = Grid(2, 3, end_of_row=True)
  prompt = preview.with_drafts(prompt, grid, preview.upsampled(small, grid))
  assert prompt.draft[:, 3:].tolist() == [
      [1, 0, 0, -1, 1, 0, 0], [0, 1, 1, -1, 0, 1, 1]]
  model = testkit.chain(2, 3, end_of_row=True, heads=(0, 0))
  for text in DRAFTED:
    decoder = registry.parse(text)
    history = engine.decode(
        model, decoder, {}, prompt, Sampling.make(), jax.random.key(0),
        jnp.arange(2), trace=True).history[1]
    rows = [row.tolist() for row in history[:, 1] if row.any()]
    assert history[0, 0, 1:].tolist() == [1, 1] and rows[0] == [0, 1, 1], text
    with pytest.raises(UserError, match="drafts=preview|init=preview"):
      testkit.run(model, decoder)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [
    "ssd:drafts=preview", "ssd:drafts=preview+vertical=1+schedule=pipelined"])
def test_ssd_needs_no_heads_then(decoder):
  """Both grids are generated; passes are those of the schedule."""
  out = pipe().generate(["ab", "c"], decoder)
  assert (out.commit_pass > 0).all() and len(set(out.passes)) == 1


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
    (lambda p: p.generate(["a"], prefix=np.zeros((1, 2), int)), "prefix"),
    (lambda p: p.stream(["a"]), "stream"),
    (lambda p: p.nll(np.zeros((1, 2, 2), int), ["a"]), "nll"),
    (lambda p: p.log_prob(np.zeros((1, 2, 2), int), ["a"]), "previews")])
def test_what_such_a_model_does_not_do_is_one_line(call, word):
  """Guidance, traces, prefixes, streams, scores without a preview."""
  with pytest.raises(UserError, match=word):
    call(pipe())
