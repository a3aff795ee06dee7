"""infer.plan: the report it prints and how it fails."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT, bad_inputs

FIELDS = {
    "family", "decoder", "settings", "topology", "devices", "mesh", "batch",
    "parameters", "memory_per_device", "fits", "bytes_per_pass",
    "flops_per_pass", "collectives", "roofline_ms", "passes", "image_seconds",
    "best"}


def plan_of(*args):
  """(exit status, stdout, stderr) of infer.plan."""
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  done = subprocess.run(
      [sys.executable, "-m", "infer.plan", *args], cwd=ROOT, env=environment,
      capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_local_device_is_planned_by_default(tmp_path):
  """All fields, a plot, passes of the emoji's grid."""
  status, out, err = plan_of(
      "--decoder=ar", "--json", f"--plot={tmp_path / 'p.png'}")
  assert status == 0, err
  found = json.loads(out.splitlines()[-1])
  assert set(found) >= FIELDS and found["passes"] == 256
  assert found["fits"] and found["queries"] == 1
  assert (tmp_path / "p.png").stat().st_size > 1000
  times = list(found["roofline_ms"].values())
  assert times == sorted(times)


@pytest.mark.slow
def test_a_slice_without_a_tpu():
  """Compiled by libtpu where it is installed; else one line says how to."""
  status, out, err = plan_of(
      "--decoder=ar", "--json", "--topology=v5e:2x2",
      "--mesh=data=2,tensor=2", "--batch=2")
  if importlib.util.find_spec("libtpu") is None:
    assert status == 2 and "ssd-jax[plan]" in err.splitlines()[-1]
    return
  assert status == 0, err
  found = json.loads(out.splitlines()[-1])
  assert found["devices"] == 4 and found["collectives"]


@pytest.mark.slow
def test_gpus_without_a_gpu(tmp_path):
  """Compiled by the CUDA plugin where it is installed; else one line says how
  to. No pass copies a layer, and the text of the program is written."""
  hlo = tmp_path / "generation.txt"
  status, out, err = plan_of(
      "--decoder=ar", "--json", "--topology=h100", f"--hlo={hlo}")
  if importlib.util.find_spec("jax_cuda13_plugin") is None:
    assert status == 2 and "ssd-jax[plan-cuda]" in err.splitlines()[-1]
    return
  assert status == 0, err
  found = json.loads(out.splitlines()[-1])
  assert found["copies_per_pass"]["bytes"] == 0
  assert found["launches_per_pass"] > 100 and "while" in hlo.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("args", [
    ["--topology=h100:0"], ["--topology=h100:two"], ["--hlo=."],
    ["--mesh=tensor=3"], ["--batch=0"], ["--train", "--batch=-1"]])
def test_bad_plans_are_one_line(tmp_path, args):
  """Meshes and devices that do not divide or exist are one line."""
  status, err, _ = bad_inputs.feed("plan", args, tmp_path)
  assert status == 2 and "Expected " in err.splitlines()[-1]
