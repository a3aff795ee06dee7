"""Self-distillation: shards, batches, a smoke training and its resumption."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from ssd_jax.core.config import LoopConfig, OptimizerConfig, UserError
from ssd_jax.models.drafter import bind_drafter
from ssd_jax.models.spatial_heads import HeadsOptions, bind_heads
from ssd_jax.pipeline import model_folder, testing
from ssd_jax.training import drafter, heads as heads_lib, loop
from ssd_jax.training.heads import MTPConfig
from ssd_jax.training.self_distillation import GenerationConfig, Teacher
from ssd_jax.training.watch import WatchConfig
from tests.support.toy_families import glm_image_config

CAPTIONS = tuple("abcdefghijk")
DRAW = GenerationConfig(batch=3, shard=4, seed=5, decoder="ar")
CONFIG = MTPConfig(
    HeadsOptions(2, 1), DRAW,
    OptimizerConfig(
        learning_rate=3e-3, final_learning_rate=1e-3, warmup_steps=2,
        clip=math.inf,
    ),
    LoopConfig(steps=24, batch=4, log_every=1, eval_every=12, save_every=8),
    eval_images=4,
)


def make_pipe():
  pipe = testing.tiny(vocab=5, rows=3, cols=3, end_of_row=True, guidance=2.0,
                      heads=(0, 0))
  return dataclasses.replace(  # as loaded without heads and drafter
      pipe, params={"trunk": pipe.params["trunk"]},
      model=pipe.family.generator.model())


def make_teacher(pipe):
  return Teacher.of(pipe)


@pytest.fixture(scope="module")
def pipe():
  return make_pipe()


@pytest.fixture(scope="module")
def teacher(pipe):
  return make_teacher(pipe)


@pytest.mark.slow
def test_training_lowers_the_loss_and_resumes_bit_for_bit(
    teacher, tmp_path, monkeypatch
):
  """A run killed after a checkpoint ends with the weights of a whole one."""
  captions = {"train": CAPTIONS, "validation": CAPTIONS[:5]}
  whole, heads_cfg = heads_lib.run(
    teacher, captions, CONFIG, tmp_path / "whole"
  )
  assert heads_cfg.options == CONFIG.heads
  assert json.loads((tmp_path / "whole" / "heads.json").read_text())

  real = heads_lib.make_step
  history = []

  def killed_at_14(*args):
    step = real(*args)

    def run(trunk, state, batch):
      if len(history) == 14:
        raise KeyboardInterrupt
      state, metrics = step(trunk, state, batch)
      history.append(float(metrics["horizontal_loss"]))
      return state, metrics

    return run

  with monkeypatch.context() as patch:
    patch.setattr(heads_lib, "make_step", killed_at_14)
    with pytest.raises(KeyboardInterrupt):
      heads_lib.run(teacher, captions, CONFIG, tmp_path / "killed")
  assert history[-1] < 0.8 * history[0]
  again, _ = heads_lib.run(teacher, captions, CONFIG, tmp_path / "killed")
  assert int(again.step) == 24
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_training_reports_acceptance(teacher, tmp_path, monkeypatch):
  """A row per direction and offset; another kind of heads is refused. How they
  decode, the speed and what is left are logged."""
  captions = {"train": CAPTIONS, "validation": CAPTIONS[:5]}
  short = dataclasses.replace(
      CONFIG, loop=dataclasses.replace(CONFIG.loop, steps=2, save_every=2),
      watch=WatchConfig(every=2, prompts=3))
  logged = {}
  monkeypatch.setattr(
      loop.tensorboardX.SummaryWriter, "add_scalar",
      lambda self, name, value, step: logged.update({(name, step): value}))
  heads_lib.run(teacher, captions, short, tmp_path, peak=1e12)
  passes = logged["ssd/passes", 2]
  assert 1 < passes < 12 and math.isfinite(logged["ssd/excess_nll", 2])
  assert logged["hours_left", 2] == 0 < logged["mfu", 2]
  assert logged["step_seconds", 2] > 0
  assert logged["draw/tokens_per_second", 11] > 0
  assert logged["draw/hours_left", 11] == 0
  with pytest.raises(UserError, match="watch.decoders .*got .*=eagle"):
    heads_lib.run(teacher, captions, dataclasses.replace(
        short, watch=WatchConfig(decoders=("eagle",))), tmp_path)
  rows = (tmp_path / heads_lib.TABLE).read_text().splitlines()
  assert [row.split(" | ")[:2] for row in rows[2:]] == [
      ["| horizontal", "1"], ["| horizontal", "2"], ["| vertical", "1"]
  ]
  assert all(0 < float(row.split(" | ")[2]) < 1 for row in rows[2:])
  assert list((tmp_path / "logs").iterdir())
  other = dataclasses.replace(short, heads=HeadsOptions(1, 1))
  with pytest.raises(UserError, match="other settings"):
    heads_lib.run(teacher, captions, other, tmp_path)


def test_an_offset_off_the_grid_is_refused(teacher, tmp_path):
  """A head that no pair could train is a mistake of the config."""
  captions = {"train": CAPTIONS, "validation": CAPTIONS}
  wide = dataclasses.replace(CONFIG, heads=HeadsOptions(3, 1))
  with pytest.raises(UserError, match="below 3.*heads.horizontal=3"):
    heads_lib.run(teacher, captions, wide, tmp_path)
  tall = dataclasses.replace(CONFIG, heads=HeadsOptions(2, 3))
  with pytest.raises(UserError, match="heads.vertical=3"):
    heads_lib.run(teacher, captions, tall, tmp_path)


@pytest.mark.slow
def test_heads_and_drafter_of_a_model_with_previews(tmp_path):
  """Previews are generated and kept with their images, and both grids are
  drafted; a model without unconditional stream drops no caption."""
  pipe = model_folder.from_config(glm_image_config())
  teacher = Teacher.of(pipe, temperature=0.0)
  captions = {"train": CAPTIONS[:6], "validation": CAPTIONS[:2]}
  cfg = dataclasses.replace(
      CONFIG, loop=LoopConfig(steps=2, batch=2, log_every=1, eval_every=2),
      draw=GenerationConfig(batch=2, shard=4, decoder="exact:drafts=preview"))
  with pytest.raises(UserError, match="unconditional"):
    heads_lib.run(teacher, captions, cfg, tmp_path)
  cfg = dataclasses.replace(cfg, drop_caption=0.0)
  state, heads_cfg = heads_lib.run(teacher, captions, cfg, tmp_path)
  found = heads_lib.generate_splits(teacher, captions, cfg.draw, tmp_path)
  greedy = pipe.generate(CAPTIONS[:6], "ar", temperature=0.0)
  np.testing.assert_array_equal(found["train"].previews, greedy.preview)
  np.testing.assert_array_equal(
      found["train"].tokens, greedy.tokens.reshape(6, -1))
  params = {**pipe.params, "heads": state.params}
  drafting = dataclasses.replace(
      pipe, params=params,
      model=bind_heads(pipe.family.generator, heads_cfg, params))
  out = drafting.generate(CAPTIONS[:2], "ssd", temperature=0.0)
  assert (out.commit_pass > 0).all()

  training = drafter.DrafterTraining(loop=cfg.loop, taps=(0,), depth=2)
  state, drafter_cfg = drafter.run(
      teacher, found, training, tmp_path / "drafter")
  params = {**pipe.params, "drafter": state.params}
  drafting = dataclasses.replace(pipe, params=params, model=bind_drafter(
      pipe.family.generator, pipe.model, drafter_cfg, params))
  out = drafting.generate(CAPTIONS[:6], "eagle", temperature=0.0)
  np.testing.assert_array_equal(out.preview, greedy.preview)
  np.testing.assert_array_equal(out.tokens, greedy.tokens)
