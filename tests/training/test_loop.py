"""The training loop: it learns, resumes exactly, and stops when it must."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import LoopConfig, OptimizerConfig, UserError
from ssd_jax.data import sources
from ssd_jax.models.vocabulary import Vocabulary
from ssd_jax.storage import checkpoints
from ssd_jax.training import ar, loop
from ssd_jax.training.state import TrainState, apply_gradients, make_optimizer
from ssd_jax.training.tokenizer import TokenizerConfig, load_augmented
from tests.support import ROOT


def fit(workdir, steps, stop_at=None, kind="adamw", scale=1.0):
  """Fits a line; raises KeyboardInterrupt in step `stop_at`."""
  cfg = LoopConfig(steps=steps, log_every=1, save_every=2, eval_every=100)
  opt_cfg = OptimizerConfig(learning_rate=0.1, warmup_steps=2, ema=0.9,
                            kind=kind)
  # The schedule must not depend on how far this run goes.
  optimizer = make_optimizer(opt_cfg, LoopConfig(steps=10))
  state = TrainState.make({"w": jnp.zeros((3, 1))}, optimizer, opt_cfg)
  data = grain.MapDataset.range(100).seed(1).shuffle().repeat().random_map(
      lambda i, rng: {"x": rng.normal(size=3).astype(np.float32)}
  ).to_iter_dataset().batch(4)
  seen = []

  @jax.jit
  def update(state, x):
    loss = lambda p: jnp.mean((x @ p["w"] - x.sum(-1, keepdims=True)) ** 2)
    value, grads = jax.value_and_grad(loss)(state.params)
    return apply_gradients(state, grads, optimizer, opt_cfg), value * scale

  def step(state, batch):
    if stop_at is not None and int(state.step) == stop_at:
      raise KeyboardInterrupt
    seen.append(batch["x"])
    state, value = update(state, batch["x"])
    return state, {"loss": value}

  return loop.train(str(workdir), state, step, data, cfg), seen


def test_broken_run_ends_in_the_same_weights(tmp_path):
  """Stopped and started again: the same batches, the same bits."""
  whole, batches = fit(tmp_path / "whole", 10)
  with pytest.raises(KeyboardInterrupt):
    fit(tmp_path / "broken", 10, stop_at=7)
  again, rest = fit(tmp_path / "broken", 10)
  chex.assert_trees_all_equal(whole, again)
  np.testing.assert_array_equal(np.stack(batches[-len(rest):]), np.stack(rest))
  assert 0 < len(rest) < len(batches)


def test_loss_falls_and_average_follows(tmp_path):
  """The optimiser learns; the averaged weights are those evaluated."""
  state, _ = fit(tmp_path, 10)
  assert float(jnp.abs(state.params["w"] - 1).max()) < 0.9
  assert state.eval_params is state.ema
  assert not np.array_equal(state.ema["w"], state.params["w"])


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
  """One line with the step and the last good checkpoint."""
  with pytest.raises(UserError, match="got loss=nan at step 1.*checkpoint"):
    fit(tmp_path, 4, scale=float("nan"))


def test_checkpoints_of_parameters_are_whole_or_absent(tmp_path):
  """save() replaces by rename; restore() gives the same arrays, or one line."""
  tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)},
          "c": np.int32(4)}
  checkpoints.save(tmp_path / "x", tree)
  checkpoints.save(tmp_path / "x", tree, np.float16)
  restored = checkpoints.restore(tmp_path / "x")
  np.testing.assert_array_equal(restored["a"]["b"], tree["a"]["b"])
  assert restored["a"]["b"].dtype == np.float16 and restored["c"] == 4
  assert os.listdir(tmp_path) == ["x"]
  with pytest.raises(UserError, match="got no checkpoint"):
    checkpoints.restore(tmp_path / "nowhere")


def command(part, workdir):
  return [sys.executable, "-m", f"train.{part}", "--config",
          "configs/emoji.py:smoke", "--workdir", str(workdir)]


def run(part, workdir):
  subprocess.run(command(part, workdir), cwd=ROOT, check=True,
                 capture_output=True)


def kill_at_random(part, workdir, after, rng):
  """Starts a run and ends it by SIGKILL once a checkpoint exists."""
  process = subprocess.Popen(command(part, workdir), cwd=ROOT,
                             stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
  saved = pathlib.Path(workdir) / part / "checkpoints"
  deadline = time.time() + 240
  while time.time() < deadline and process.poll() is None and not (
      saved.is_dir() and any(d.name.isdigit() for d in saved.iterdir())):
    time.sleep(0.01)
  time.sleep(rng.uniform(0, after))
  process.send_signal(signal.SIGKILL)
  process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["tokenizer", "ar"])
def test_sigkill_at_any_moment_changes_nothing(tmp_path, part):
  """Killed twice at random moments, training ends in the same bits."""
  rng = random.Random(part)
  for name in ("whole", "broken"):
    if part == "ar":
      run("tokenizer", tmp_path / name)
  run(part, tmp_path / "whole")
  for _ in range(2):
    kill_at_random(part, tmp_path / "broken", 1.0, rng)
  run(part, tmp_path / "broken")
  model = {"tokenizer": "vq", "ar": "trunk"}[part]
  a, b = (checkpoints.restore(tmp_path / name / "model" / model)
          for name in ("whole", "broken"))
  chex.assert_trees_all_equal(a, b)


def test_a_picture_may_stay_where_it_is():
  """max_shift=0 moves nothing; negative settings are one line."""
  source = sources.EmojiSource("validation", 32)
  rng = np.random.default_rng(0)
  image = load_augmented(source, 0, rng, 0)["image"]
  chex.assert_shape(image, (32, 32, 3))
  chex.assert_shape(load_augmented(source, 0, rng, 3)["image"], (32, 32, 3))
  with pytest.raises(UserError, match="got max_shift=-1, expected 0 or more"):
    TokenizerConfig(max_shift=-1)


def test_codes_of_other_pictures_are_not_taken(
    tmp_path, monkeypatch, capsys):
  """Kept codes belong to their pictures and tokenizer; others are made anew,
  and so are damaged ones."""
  monkeypatch.setattr(
      ar, "reconstruct",
      lambda vq, params, images, on_batch: (None, images[..., 0]))

  class Source(list):
    def variants(self, index):
      image = np.full((2, 2, 3), self[index], np.uint8)
      return [{"caption": str(self[index]), "tags": (), "image": image}]

  encode = lambda pictures, params: ar.encode_split(
      None, params, Source(pictures), tmp_path / "train_tokens.npy")
  for pictures in ([1, 2], [0, 1, 2], [1, 2]):
    codes = encode(pictures, {"w": np.zeros(1)})
    assert codes.tokens[:, 0].tolist() == pictures
  assert len(list(tmp_path.iterdir())) == 2
  encode([1, 2], {"w": np.ones(1)})
  assert len(list(tmp_path.iterdir())) == 3
  capsys.readouterr()
  for path in tmp_path.iterdir():
    whole = path.read_bytes()
    flipped = whole.replace(b"\x01\x01", b"\x01\x03", 1)
    for damaged in (b"", whole[:len(whole) // 2], flipped):
      path.write_bytes(damaged)
      encode([1, 2], {"w": np.ones(1)})
      encode([0, 1, 2], {"w": np.zeros(1)})
      codes = encode([1, 2], {"w": np.zeros(1)})
      assert codes.tokens[:, 0].tolist() == [1, 2]
      assert path.read_bytes() == whole and flipped != whole
      assert capsys.readouterr().err.count("made again\n") == 1


def test_few_held_out_pictures_are_a_batch():
  """A split smaller than a batch is measured all the same."""
  words = Vocabulary.build(["a", "b"], 6)
  few = ar.TokenSource(
      np.zeros((2, 4), np.int32), ("a", "b"), ((), ()), ((0,), (1,)))
  (batch,) = ar.plain_batches(few, words, 8, 64)
  assert batch["tokens"].shape == (2, 4)
