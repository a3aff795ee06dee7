"""After any failure, a run resumes from an intact checkpoint."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ssd_jax.core.config import LoopConfig, OptimizerConfig, UserError
from ssd_jax.storage import checkpoints
from ssd_jax.training import loop
from ssd_jax.training.state import TrainState, apply_gradients, make_optimizer
from tests.support import ROOT, tiny_training as tiny


def assert_same(one, other):
  chex.assert_trees_all_equal(one.params, other.params)


@pytest.mark.slow
def test_kills_while_saving(tmp_path):
  """A child that saves every step is killed eight times; nothing is lost."""
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  subprocess.run(
      [sys.executable, "-m", "tests.support.tiny_training",
       "--workdir", tmp_path, "--kills=8"],
      check=True, env=environment, capture_output=True)
  a, b = (checkpoints.restore(tmp_path / f"weights_{name}")
          for name in ("run", "whole"))
  chex.assert_trees_all_equal(a, b)


def test_sigterm_saves_exits_0_and_resumes(tmp_path, monkeypatch, capsys):
  """Told to stop in step 5: that step is saved, the rest is the same
  bits."""
  whole = tiny.train(tmp_path / "whole", 8)
  due, steps = loop.Preemption.is_due, itertools.count(1)

  def terminate(self):
    if next(steps) == 5:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.05)
    return due(self)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Preemption, "is_due", terminate)
    with pytest.raises(SystemExit) as stopped:
      tiny.train(tmp_path / "run", 8, save_every=100)
  assert stopped.value.code == 0
  assert "saved step 5" in capsys.readouterr().err
  assert os.listdir(tmp_path / "run" / "checkpoints") == ["5"]
  assert_same(tiny.train(tmp_path / "run", 8), whole)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
  """Files cut in half: the one before it is taken, and the end is the same."""
  whole = tiny.train(tmp_path / "whole", 10)
  tiny.train(tmp_path / "run", 8)
  newest = tmp_path / "run" / "checkpoints" / "8"
  for path in newest.rglob("*"):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)
  assert_same(tiny.train(tmp_path / "run", 10), whole)
  assert "checkpoint 8" in capsys.readouterr().err
  aside, = (tmp_path / "run" / "damaged").iterdir()
  assert aside.name.startswith("8-") and any(aside.iterdir())


def test_a_single_bit_of_a_training_checkpoint_is_noticed(tmp_path, capsys):
  """A number, or the place in the data, that differs from what was saved: the
  checkpoint before it is taken, and the end is the same."""
  whole = tiny.train(tmp_path / "whole", 8, width=8)
  tiny.train(tmp_path / "run", 6, width=8)
  folder = tmp_path / "run" / "checkpoints"
  # The whole state of a smaller step, and the place of another.
  shutil.rmtree(folder / "6" / "state")
  shutil.copytree(folder / "2" / "state", folder / "6" / "state")
  place, = (folder / "4" / "data").glob("*.json")
  place.write_text(place.read_text().replace("32", "40"))
  assert_same(tiny.train(tmp_path / "run", 8, width=8), whole)
  said = capsys.readouterr().err
  assert "checkpoint 6" in said and "checkpoint 4" in said


@pytest.mark.parametrize("name", ["checkpoints", "logs"])
def test_a_file_in_place_of_a_runs_folder_is_one_line(tmp_path, name):
  """An error before anything is trained; nothing waits for it for ever."""
  (tmp_path / name).write_text("mine")
  with pytest.raises(UserError, match=f"{name}, which is not a folder"):
    tiny.train(tmp_path, 2)
  assert (tmp_path / name).read_text() == "mine"


def test_other_settings_do_not_touch_a_runs_checkpoints(tmp_path):
  """A matrix of another size: one line that names it; the run goes on."""
  whole = tiny.train(tmp_path / "whole", 6)
  tiny.train(tmp_path / "run", 4)
  with pytest.raises(
    UserError, match=r"shape \(8, 2\) by .*w1 of shape \(8, 4\)"
  ):
    tiny.train(tmp_path / "run", 6, width=2)
  assert_same(tiny.train(tmp_path / "run", 6), whole)


def test_when_all_are_damaged_nothing_is_made_up(tmp_path):
  """One line; training does not start anew by itself."""
  tiny.train(tmp_path, 2)
  for path in (tmp_path / "checkpoints").rglob("*"):
    if path.is_file():
      os.truncate(path, 0)
  with pytest.raises(UserError, match="got damaged checkpoints.*[Rr]emove"):
    tiny.train(tmp_path, 4)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
  """No room for step 4: the run ends, step 2 stays, and goes on later."""
  whole = tiny.train(tmp_path / "whole", 6)
  save = loop.ocp.CheckpointManager.save

  def full(self, step, **kwargs):
    if step == 4:
      raise OSError(errno.ENOSPC, "No space left on device")
    return save(self, step, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(loop.ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match="Expected space.*No space left"):
      tiny.train(tmp_path / "run", 6)
  assert "2" in os.listdir(tmp_path / "run" / "checkpoints")
  assert_same(tiny.train(tmp_path / "run", 6), whole)


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
  """A day back in the middle: steps, not times, say which one is newest."""
  whole = tiny.train(tmp_path / "whole", 6)
  tiny.train(tmp_path / "run", 4)
  now = time.time
  monkeypatch.setattr(time, "time", lambda: now() - 86_400)
  for path in (tmp_path / "run" / "checkpoints").iterdir():
    os.utime(path, (now() + int(path.name), now() - int(path.name)))
  assert_same(tiny.train(tmp_path / "run", 6), whole)


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


def test_an_error_that_is_not_the_files_leaves_checkpoints_alone(
    tmp_path, monkeypatch):
  """Too little memory while restoring moves no checkpoint to damaged/."""
  tiny.train(tmp_path / "run", 4)

  def fail(*args, **kwargs):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
  with pytest.raises(RuntimeError, match="out of memory"):
    tiny.train(tmp_path / "run", 6)
  monkeypatch.undo()
  assert not (tmp_path / "run" / "damaged").exists()
  whole = tiny.train(tmp_path / "whole", 6)
  assert_same(tiny.train(tmp_path / "run", 6), whole)
