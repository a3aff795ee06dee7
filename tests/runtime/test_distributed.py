"""Several processes on this machine work as one, and end together."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.runtime import distributed
from ssd_jax.storage import checkpoints
from tests.support import QUICK_FLAGS, ROOT

DEVICES = 4


def start(workdir, count, *args):
  """`count` processes of one job with DEVICES virtual devices in all."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}"
                   + QUICK_FLAGS}
  each = lambda i: [
      sys.executable, "-m", "tests.support.tiny_training", "--workdir", workdir,
      *args,
      *((f"--coordinator=localhost:{port}", f"--num_processes={count}",
         f"--process_id={i}") if count > 1 else ())]
  return [subprocess.Popen(each(i), env=environment, stderr=subprocess.PIPE,
                           text=True) for i in range(count)]


def finish(processes, seconds=240):
  """[(exit status, what it said)] of processes that may not hang."""
  try:
    said = [p.communicate(timeout=seconds)[1] for p in processes]
  finally:
    for process in processes:
      process.kill()
  return [(p.returncode, s) for p, s in zip(processes, said, strict=True)]


def assert_same(one, other):
  """Images to the code, weights within rounding."""
  np.testing.assert_array_equal(
      np.load(one / "drawn.npy"), np.load(other / "drawn.npy"))
  a, b = (checkpoints.restore(x / "weights")["w1"] for x in (one, other))
  np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """What one process without a mesh makes."""
  folder = tmp_path_factory.mktemp("alone")
  [(status, said)] = finish(start(folder, 1, "--draws"))
  assert status == 0, said
  return folder


@pytest.mark.slow
def test_a_job_survives_the_death_of_a_host(tmp_path, alone):
  """The other ends with an error; together again they end as one process."""
  died = finish(start(tmp_path, 2, "--draws", "--die_at=5"))
  assert all(status != 0 for status, _ in died)
  shards = sorted((tmp_path / "tokens").glob("*.npz"))
  written = [path.stat().st_mtime_ns for path in shards]
  assert len(shards) == 3
  for status, said in finish(start(tmp_path, 2, "--draws")):
    assert status == 0, said
  assert written == [path.stat().st_mtime_ns for path in shards]
  assert_same(tmp_path, alone)


@pytest.mark.slow
def test_all_hosts_stop_when_one_gets_sigterm_while_generating(tmp_path, alone):
  """Status 0 on both, whole files kept; the end is that of one process."""
  for status, said in finish(start(tmp_path, 2, "--draws", "--is_reported")):
    assert status == 0 and "stopped by SIGTERM: complete files" in said, said
  kept = len(list((tmp_path / "tokens").glob("*.npz")))
  assert kept < 3 and not (tmp_path / "drawn.npy").exists()
  for status, said in finish(start(tmp_path, 2, "--draws")):
    assert status == 0, said
  assert_same(tmp_path, alone)


@pytest.mark.slow
def test_another_number_of_hosts_continues(tmp_path, alone):
  """A run of one process, stopped, is ended by two: the same batches."""
  [(status, _)] = finish(start(tmp_path, 1, "--draws", "--steps=6"))
  assert status == 0
  for status, said in finish(start(tmp_path, 2, "--draws")):
    assert status == 0, said
  assert_same(tmp_path, alone)


@pytest.mark.parametrize("more", [
    {}, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1"}])
def test_a_slurm_allocation_without_srun_is_one_line(monkeypatch, more):
  """A shell or a script, which would wait for processes without end."""
  for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "3", **more}.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match="srun .*--num_processes 1"):
    distributed.join()
  assert not distributed.join(num_processes=1)


@pytest.mark.parametrize("given", [
    ("localhost:1", None, None), ("localhost:1", 2, 2)])
def test_half_a_job_is_one_line(given):
  """All three flags or none, and a place within the job."""
  with pytest.raises(UserError, match="Expected .*process_id.*got"):
    distributed.join(*given)
