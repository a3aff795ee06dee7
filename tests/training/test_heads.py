"""Self-distillation: shards, batches, a smoke training and its resumption."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from ssd_jax.core.config import LoopConfig, OptimizerConfig, UserError
from ssd_jax.decoding.ar import AR
from ssd_jax.models.spatial_heads import HeadsOptions
from ssd_jax.pipeline import testing
from ssd_jax.training import heads as heads_lib, self_distillation
from ssd_jax.training.heads import MTPConfig
from ssd_jax.training.self_distillation import GenerationConfig, Teacher
from tests.support import ROOT

CAPTIONS = tuple("abcdefghijk")
DRAW = GenerationConfig(batch=3, shard=4, seed=5)
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
  return testing.tiny(vocab=5, rows=3, cols=3, end_of_row=True, guidance=2.0)


def make_teacher(pipe):
  settings, guided = pipe.sampling()
  return Teacher(
      pipe.family.generator, pipe.params, pipe.family.encode_prompts, settings,
      guided,
  )


@pytest.fixture(scope="module")
def pipe():
  return make_pipe()


@pytest.fixture(scope="module")
def teacher(pipe):
  return make_teacher(pipe)


@pytest.fixture(scope="module")
def drawn(teacher, tmp_path_factory):
  return self_distillation.generate_images(
    teacher, CAPTIONS, DRAW, tmp_path_factory.mktemp("all")
  )


def test_images_are_those_of_ar(pipe, drawn):
  """Stage one stores what generate() draws for the same seed, in codes."""
  out = pipe.generate(list(CAPTIONS), AR(), seed=5, batch=11)
  np.testing.assert_array_equal(drawn.tokens, out.tokens.reshape(11, -1))
  assert drawn.tokens.dtype == np.uint8
  np.testing.assert_array_equal(
      drawn.sequences(np.arange(11)), pipe.sequence(out.tokens)
  )


def draw_until_killed(folder):
  """Draws into a folder; dies by SIGKILL while it writes the second shard."""
  real, calls = self_distillation.os.replace, []

  def replace(partial, path):
    if pathlib.Path(path).name.startswith("tokens-00001"):
      os.kill(os.getpid(), signal.SIGKILL)
    calls.append(real(partial, path))

  self_distillation.os.replace = replace
  self_distillation.generate_images(
    make_teacher(make_pipe()), CAPTIONS, DRAW, folder
  )


def test_a_killed_draw_loses_and_repeats_nothing(
    teacher, drawn, tmp_path, monkeypatch
):
  """Killed before the second shard's rename and restarted: the same images."""
  child = subprocess.run(
      [sys.executable, "-c", "from tests.training import test_heads; "
       f"test_heads.draw_until_killed({str(tmp_path)!r})"],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      capture_output=True)
  assert child.returncode == -signal.SIGKILL, child.stderr
  assert [f.name for f in tmp_path.glob("*.npy")] == [
      "tokens-00000-of-00003.npy"]
  real, calls = self_distillation._draw_images, []
  monkeypatch.setattr(
      self_distillation, "_draw_images",
      lambda *args: (calls.append(args[2][0]), real(*args))[1])
  again = self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)
  np.testing.assert_array_equal(again.tokens, drawn.tokens)
  assert calls == [4, 8]  # the first shard was not drawn again
  assert not list(tmp_path.glob(".*"))


def test_a_kill_between_write_and_rename_is_harmless(
    teacher, drawn, tmp_path, monkeypatch
):
  """What was not renamed is not read."""
  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(self_distillation.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)
  again = self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)
  np.testing.assert_array_equal(again.tokens, drawn.tokens)


def test_images_of_other_settings_are_refused(teacher, drawn, tmp_path):
  """Captions, seed and sampling are in the manifest; damage is named."""
  del drawn
  self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)
  with pytest.raises(UserError, match="whose captions differs"):
    self_distillation.generate_images(teacher, CAPTIONS[::-1], DRAW, tmp_path)
  with pytest.raises(UserError, match="whose seed differs"):
    self_distillation.generate_images(
        teacher, CAPTIONS, dataclasses.replace(DRAW, seed=6), tmp_path)
  hotter = dataclasses.replace(teacher, guided=False)
  with pytest.raises(UserError, match="whose sampling differs"):
    self_distillation.generate_images(hotter, CAPTIONS, DRAW, tmp_path)
  next(tmp_path.glob("tokens-00001*")).write_bytes(b"half")
  with pytest.raises(UserError, match="damaged.*tokens-00001"):
    self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)


def test_dropped_captions_are_the_unconditional_stream(teacher, drawn):
  """Rows hold the image's caption or, at the given rate, the empty one."""
  stream = iter(
    self_distillation.batches(drawn, teacher, 8, 0, drop_caption=0.5)
  )
  prompt_of = {}
  for image, text in enumerate(CAPTIONS):
    both, _ = teacher.encode_prompts([text], True)
    prompt_of[image] = np.asarray(both.tokens)
  dropped = total = 0
  sequences = drawn.sequences(np.arange(len(drawn)))
  for _ in range(20):
    batch = next(stream)
    rows = np.asarray(batch["prompt"].tokens)
    for row, tokens in zip(rows, batch["tokens"], strict=True):
      images = np.flatnonzero((sequences == tokens).all(-1))
      is_cond = any((prompt_of[i][0] == row).all() for i in images)
      is_uncond = (prompt_of[images[0]][1] == row).all()
      assert is_cond or is_uncond
      dropped, total = dropped + is_uncond, total + 1
  assert abs(dropped / total - 0.5) < 0.15


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


def test_training_reports_acceptance(teacher, tmp_path):
  """A row per direction and offset; another kind of heads is refused."""
  captions = {"train": CAPTIONS, "validation": CAPTIONS[:5]}
  short = dataclasses.replace(
      CONFIG, loop=dataclasses.replace(CONFIG.loop, steps=1, save_every=1)
  )
  heads_lib.run(teacher, captions, short, tmp_path)
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
  with pytest.raises(UserError, match="heads.horizontal=3.*below 3"):
    heads_lib.run(teacher, captions, wide, tmp_path)
  tall = dataclasses.replace(CONFIG, heads=HeadsOptions(2, 3))
  with pytest.raises(UserError, match="heads.vertical=3"):
    heads_lib.run(teacher, captions, tall, tmp_path)
