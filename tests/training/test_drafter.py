"""The drafter: one function with and without its cache, and how it trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import LoopConfig, OptimizerConfig, UserError
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.trees import shapes as tree_shapes
from ssd_jax.decoding.trees.eagle import Eagle
from ssd_jax.models.drafter import DraftNet, bind_drafter
from ssd_jax.pipeline import testing
from ssd_jax.training import drafter as training
from ssd_jax.training.draft_paths import Acceptance
from ssd_jax.training.heads import plain_batches
from ssd_jax.training.self_distillation import GeneratedTokens, Teacher


def test_softening_spreads_over_alike_slots_alone():
  """Slots with like states share their targets, others keep their own."""
  p_BMV = jnp.array([[[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]])
  hidden_BMD = jnp.array([[[1.0, 0], [2.0, 0.1], [0, 1.0]]])
  plain = training.DrafterTraining()
  assert training.soften(p_BMV, hidden_BMD, plain) is p_BMV
  aware = dataclasses.replace(plain, redundancy=0.5, likeness=0.9)
  np.testing.assert_allclose(
      training.soften(p_BMV, hidden_BMD, aware),
      [[[0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0, 1.0]]], atol=1e-6)


@pytest.mark.slow
def test_training_learns_to_draft_and_resumes(tmp_path):
  """Better drafts after a few steps; a second run continues the first."""
  pipe = testing.tiny(2, 2, 2, heads=(0, 0), guidance=2.0)
  teacher = Teacher.of(pipe)
  tokens = np.random.default_rng(0).integers(0, 2, (16, 4))
  drawn = dict.fromkeys(
      ("train", "validation"),
      GeneratedTokens(("ab",) * 16, tokens, pipe.model.grid, 2))
  cfg = training.DrafterTraining(
      optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
      loop=LoopConfig(steps=20, batch=8, save_every=20, eval_every=20),
      redundancy=0.1, unroll=2, taps=(0,), depth=2, eval_images=8,
  )
  net = DraftNet(dataclasses.replace(teacher.generator, taps=cfg.taps))
  batch = next(iter(training.both_streams(drawn["train"], teacher, cfg.loop)))

  def losses(drafter):
    params = {**pipe.params, "drafter": drafter}
    hidden = training.stream_states(net, params, **_named(batch))
    return training.drafter_losses(
        net, params, hidden, batch["tokens"], jnp.float32(2.0), cfg,
        jax.random.key(0))

  state, drafter_cfg = training.run(teacher, drawn, cfg, tmp_path)
  before = losses(net.init(jax.random.key(cfg.loop.seed)))
  after = losses(state.params)
  assert after[0] < 0.9 * before[0]
  assert after[1] < before[1]
  assert "Mean accepted length" in (tmp_path / training.TABLE).read_text()
  bind_drafter(teacher.generator, pipe.model, drafter_cfg,
               {**pipe.params, "drafter": state.params})
  again, _ = training.run(teacher, drawn, cfg, tmp_path)
  assert int(again.step) == 20
  jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
  plain = dataclasses.replace(cfg, redundancy=0.0)
  with pytest.raises(UserError, match="another loss"):
    training.run(teacher, drawn, plain, tmp_path)


def _named(batch):
  return {"prompt": batch["prompt"], "tokens_BN": batch["tokens"]}


@pytest.mark.slow
def test_accepted_length_is_that_of_decoding():
  """The figure is what `eagle` reaches with that tree, to the pass."""
  pipe = testing.tiny(3, 2, 3, end_of_row=True, heads=(0, 0), guidance=2.0)
  teacher = Teacher.of(pipe)
  images, grid = 32, pipe.model.grid
  draw = functools.partial(
      pipe.generate, ["ab"], num_images=images, batch=images)
  drawn = GeneratedTokens(
      ("ab",) * images, draw(AR()).tokens.reshape(images, -1), grid, 3)
  find = training.make_ranks(DraftNet(teacher.generator), teacher, 3)
  found = Acceptance.of(
      find(pipe.params["drafter"], plain_batches(drawn, teacher, 8, images)), 3)
  # Three codes, three ranks: one of them is always right.
  np.testing.assert_allclose(found.rates_DK.sum(-1), 1.0, atol=1e-6)
  for tree in (tree_shapes.parse("0/1/00/10/000"), found.tree):
    verifying = draw(Eagle(tree_shapes.tree_name(tree))).passes - 1
    expected = images * (grid.length - 1) / verifying.sum()
    np.testing.assert_allclose(found.length(tree), expected)
