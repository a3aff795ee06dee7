"""Losses of the spatial heads: which token predicts which, smooth L1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.grid import Grid
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.models.spatial_heads import (
  INPUTS,
  TARGETS,
  HeadsConfig,
  HeadsOptions,
  SpatialHeads,
)
from ssd_jax.pipeline import testing
from ssd_jax.training import losses


@pytest.fixture(scope="module")
def pipe():
  return testing.tiny(vocab=5, rows=3, cols=4, end_of_row=True)


def make_heads(pipe, options=HeadsOptions(3, 2)):
  """(heads, params of trunk and heads)."""
  generator = pipe.family.generator
  heads = SpatialHeads(
      generator, HeadsConfig.make(generator, options, pipe.params)
  )
  weights = heads.init(jax.random.key(1))
  return heads, {**pipe.params, "heads": weights}


def some_cells(shape=(2, 6)):
  """(hidden states, tokens)."""
  hidden = jax.random.normal(jax.random.key(2), (*shape, 16))
  return hidden, jax.random.randint(jax.random.key(3), shape, 0, 5)


def test_pairs_are_cells_of_the_same_row_or_column():
  """No pair leaves its row or column; end-of-row slots are no tokens."""
  grid = Grid(2, 3, end_of_row=True)
  target, exists = losses.pairs(grid, "horizontal", 2, wrap=False)
  assert target[exists].tolist() == [1, 2, 4, 5, 2, 5]
  assert exists.sum(-1).tolist() == [4, 2]
  target, exists = losses.pairs(grid, "horizontal", 2, wrap=True)
  assert target[1][exists[1]].tolist() == [2, 3, 4, 5]
  target, exists = losses.pairs(grid, "vertical", 2, wrap=False)
  assert target[0][exists[0]].tolist() == [3, 4, 5]
  assert not exists[1].any()


class Oracle(SpatialHeads):
  """Predicts what a head should, looked up by position in the raster."""

  def predict(self, params, direction, hidden, tokens, offset=None):
    count, grid = self.cfg.count(direction), self.generator.grid
    target, _ = losses.pairs(grid, direction, count, self.cfg.options.wrap)
    goal = self.goal(params, hidden, tokens)
    return jnp.moveaxis(goal[..., target, :], -3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pre", "post"])
def test_the_right_prediction_is_always_accepted(pipe, target):
  """Goals are states that predict the target token, decoded to the trunk's
  p."""
  heads, params = make_heads(pipe, HeadsOptions(3, 2, target=target))
  oracle = Oracle(heads.generator, heads.cfg)
  tokens = pipe.sequence(np.arange(24).reshape(2, 3, 4) % 5)
  prompt, _ = pipe.family.encode_prompts(["a", "b"], False)
  hidden = heads.generator.hidden(params, prompt, tokens)
  figures = losses.head_acceptance(
      oracle, params, hidden[None], tokens, Sampling.make()
  )
  for name, loss in losses.head_losses(oracle, params, hidden, tokens).items():
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    np.testing.assert_allclose(figures[name]["accept"], 1.0, atol=1e-5)
    assert (figures[name]["top1"] > 1 / 5).all()


@pytest.mark.quick(1)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_ablation_has_finite_losses_and_logits(pipe, inputs, target):
  """Each input x target gives finite losses and drafts."""
  heads, params = make_heads(pipe, HeadsOptions(1, 1, inputs, target))
  hidden, tokens = some_cells((2, 14))
  loss = losses.head_losses(heads, params, hidden, tokens)
  assert loss["horizontal"].shape == (1,)
  assert all(np.isfinite(x).all() and (x > 0).all() for x in loss.values())
  logits = heads.draft(params, "vertical", 1, hidden, tokens)
  assert logits.shape == (2, 14, 5) and np.isfinite(logits).all()


def test_the_whole_distribution_is_the_mean_of_all_tokens(pipe):
  """Fitted to the trunk's distribution, the loss is the token's, averaged over
  it."""
  of = lambda target: make_heads(pipe, HeadsOptions(1, 1, "h+e", target))
  (heads, params), (by_token, _) = of("distribution"), of("token")
  hidden, tokens = some_cells((1, 14))
  loss = losses.head_losses(heads, params, hidden, tokens)["vertical"][0]
  slots = pipe.model.grid.slot_of
  p_RCV = jax.nn.softmax(heads.generator.logits(params, hidden[0, slots]))
  total = 0.0
  for slot in slots[1:].ravel():
    row, col = np.argwhere(slots == slot)[0]
    source = slots[row - 1, col]
    logits_V = by_token.draft(
        params, "vertical", 1, hidden[0, source], tokens[0, source])
    total -= jnp.sum(p_RCV[row, col] * jax.nn.log_softmax(logits_V))
  np.testing.assert_allclose(loss, total / slots[1:].size, rtol=1e-5)


def test_smooth_l1_is_pytorch_s():
  """beta 1: quadratic within 1, linear beyond, mean over the width."""
  got = losses.smooth_l1(jnp.array([[0.5, 3.0]]), jnp.zeros((1, 2)))
  np.testing.assert_allclose(got, [(0.125 + 2.5) / 2])
