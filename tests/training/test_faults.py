"""Whatever befalls a run, it continues from a whole checkpoint."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.storage import checkpoints
from ssd_jax.training import loop, self_distillation
from ssd_jax.training.self_distillation import GenerationConfig
from ssd_jax.training.state import checksum_tree
from tests.support import ROOT, tiny_training as tiny


def assert_same(one, other):
  chex.assert_trees_all_equal(one.params, other.params)


@pytest.mark.slow
def test_twenty_kills_while_saving(tmp_path):
  """A child that saves every step dies twenty times; nothing is lost."""
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  subprocess.run(
      [sys.executable, "-m", "tests.support.tiny_training",
       "--workdir", tmp_path, "--kills=20"],
      check=True, env=environment, capture_output=True)
  a, b = (checkpoints.restore(tmp_path / f"weights_{name}")
          for name in ("run", "whole"))
  chex.assert_trees_all_equal(a, b)


def test_sigterm_saves_exits_0_and_resumes(tmp_path, monkeypatch, capsys):
  """Told to stop in step 5: that step is saved, the rest is the same bits."""
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


def test_a_sum_tells_every_bit():
  """Another one for each bit of each kind of number, whatever its place."""
  kinds = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, bool]
  leaves = [jnp.ones((3, 5), kind) for kind in kinds]
  before = [int(x) for x in checksum_tree(leaves)]
  for at, leaf in enumerate(leaves):
    flat = np.array(leaf).view(np.uint8).reshape(-1)
    for place in (0, flat.size // 2, flat.size - 1):
      other = flat.copy()
      other[place] ^= 1
      other = jnp.asarray(other.view(leaf.dtype).reshape(leaf.shape))
      assert int(checksum_tree([other])[0]) != before[at]
  swapped = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])
  assert len({int(x) for x in checksum_tree(swapped)}) == 2


@pytest.mark.parametrize("name", ["checkpoints", "logs"])
def test_a_file_in_place_of_a_runs_folder_is_one_line(tmp_path, name):
  """Told before anything is trained; nothing waits for it for ever."""
  (tmp_path / name).write_text("mine")
  with pytest.raises(UserError, match=f"{name}, which is no folder"):
    tiny.train(tmp_path, 2)
  assert (tmp_path / name).read_text() == "mine"


def test_other_settings_do_not_touch_a_runs_checkpoints(tmp_path):
  """A matrix of another size: one line that names it; the run goes on."""
  whole = tiny.train(tmp_path / "whole", 6)
  tiny.train(tmp_path / "run", 4)
  with pytest.raises(UserError, match=r"w1 of shape \(8, 4\).*\(8, 2\) by"):
    tiny.train(tmp_path / "run", 6, width=2)
  assert_same(tiny.train(tmp_path / "run", 6), whole)


def test_when_all_are_damaged_nothing_is_made_up(tmp_path):
  """One line; training does not start anew by itself."""
  tiny.train(tmp_path, 2)
  for path in (tmp_path / "checkpoints").rglob("*"):
    if path.is_file():
      os.truncate(path, 0)
  with pytest.raises(UserError, match="got damaged checkpoints.*remove"):
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
    with pytest.raises(UserError, match="No space left.*expected room"):
      tiny.train(tmp_path / "run", 6)
  assert "2" in os.listdir(tmp_path / "run" / "checkpoints")
  assert_same(tiny.train(tmp_path / "run", 6), whole)


def test_a_removed_shard_is_drawn_again(tmp_path):
  """The same images; the other shards are not touched."""
  teacher, cfg = tiny.teacher(), GenerationConfig(batch=2, shard=2)
  before = self_distillation.generate_images(
    teacher, list("abcdef"), cfg, tmp_path
  ).tokens
  shards = sorted(tmp_path.glob("*.npy"))
  written = [path.stat().st_mtime_ns for path in shards]
  shards[1].unlink()
  again = self_distillation.generate_images(
    teacher, list("abcdef"), cfg, tmp_path
  ).tokens
  np.testing.assert_array_equal(before, again)
  now = [path.stat().st_mtime_ns for path in shards]
  assert now[::2] == written[::2] and now[1] != written[1]


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
  """A day back in the middle: steps, not times, say which one is newest."""
  whole = tiny.train(tmp_path / "whole", 6)
  tiny.train(tmp_path / "run", 4)
  now = time.time
  monkeypatch.setattr(time, "time", lambda: now() - 86_400)
  for path in (tmp_path / "run" / "checkpoints").iterdir():
    os.utime(path, (now() + int(path.name), now() - int(path.name)))
  assert_same(tiny.train(tmp_path / "run", 6), whole)
