"""Several processes on this machine work as one, and end together."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.pipeline import testing
from ssd_jax.runtime import distributed
from ssd_jax.storage import checkpoints
from tests.support import QUICK_FLAGS, ROOT, tiny_server

DEVICES = 4


def start(count, program, *args):
  """`count` processes of one job with DEVICES virtual devices in all."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}"
                   + QUICK_FLAGS}
  job = (f"--coordinator=localhost:{port}", f"--num_processes={count}")
  each = lambda i: [
      sys.executable, "-m", f"tests.support.{program}", *args,
      *((*job, f"--process_id={i}") if count > 1 else ())]
  return [subprocess.Popen(each(i), env=environment, stderr=subprocess.PIPE,
                           text=True) for i in range(count)]


def train(workdir, count, *args):
  """Starts the training of a tiny model."""
  return start(count, "tiny_training", "--workdir", workdir, *args)


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
  [(status, said)] = finish(train(folder, 1, "--draws"))
  assert status == 0, said
  return folder


@pytest.mark.slow
def test_a_job_survives_the_death_of_a_host(tmp_path, alone):
  """The other ends with an error; one process alone goes on where they were,
  with the same batches, and ends as if nothing had happened."""
  died = finish(train(tmp_path, 2, "--draws", "--die_at=5"))
  assert all(status != 0 for status, _ in died)
  shards = sorted((tmp_path / "tokens").glob("*.npz"))
  written = [path.stat().st_mtime_ns for path in shards]
  assert len(shards) == 3
  [(status, said)] = finish(train(tmp_path, 1, "--draws"))
  assert status == 0, said
  assert written == [path.stat().st_mtime_ns for path in shards]
  assert_same(tmp_path, alone)


@pytest.mark.slow
def test_all_hosts_stop_when_one_gets_sigterm_while_generating(tmp_path, alone):
  """Status 0 on both, whole files kept; the end is that of one process."""
  for status, said in finish(train(tmp_path, 2, "--draws", "--is_reported")):
    assert status == 0 and "stopped by SIGTERM: complete files" in said, said
  kept = len(list((tmp_path / "tokens").glob("*.npz")))
  assert kept < 3 and not (tmp_path / "drawn.npy").exists()
  for status, said in finish(train(tmp_path, 2, "--draws")):
    assert status == 0, said
  assert_same(tmp_path, alone)


def ask(port, path, **fields):
  """(status, answer) of a request to a server of this machine."""
  with contextlib.closing(
      http.client.HTTPConnection("127.0.0.1", port, timeout=100)) as connection:
    if fields:
      connection.request("POST", path, json.dumps(fields),
                         {"Content-Type": "application/json"})
    else:
      connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.slow
def test_two_hosts_serve_as_one():
  """The first answers, the other repeats what it does: images are those of
  one host, a decoder that is new or that the model lacks is no end, SIGTERM
  to the first ends both, although a client never ends its request."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  hosts = start(2, "tiny_server", f"--port={port}", "--decoders=ar",
                "--any_decoder", "--max_images=3")
  try:
    pipe = testing.tiny(**tiny_server.SIZES)
    made = pipe.generate(["a"], num_images=3, seed=4).images
    while True:
      with contextlib.suppress(OSError):
        if ask(port, "/ready")[0] == 200:
          break
      assert all(host.poll() is None for host in hosts)
      time.sleep(0.1)
    path = "/v1/images/generations"
    status, events = ask(port, path, prompt="a", n=3, seed=4, stream=True,
                         partial_images=1)
    assert status == 200
    found = [json.loads(line[6:]) for line in events.decode().splitlines()
             if line.startswith("data: {")]
    assert sum("partial" in event["type"] for event in found) == 3
    pictures = {event["image_index"]: event["b64_json"] for event in found
                if event["type"].endswith("completed")}
    for i in range(3):
      np.testing.assert_array_equal(
          Image.open(io.BytesIO(base64.b64decode(pictures[i]))), made[i])
    for decoder, said in (("sjd:window=2", 200), ("ssd:vertical=9", 400)):
      assert ask(port, path, prompt="a", decoder=decoder)[0] == said
    with socket.create_connection(("127.0.0.1", port)) as half:
      half.sendall(
          f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
          "Content-Type: application/json\r\n\r\n{".encode())
      hosts[0].send_signal(signal.SIGTERM)
      assert [status for status, _ in finish(hosts, 60)] == [0, 0]
  finally:
    for host in hosts:
      host.kill()


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
