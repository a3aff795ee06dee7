"""A mesh changes where arrays are placed, not the results."""

import json
import os
import subprocess
import sys

import jax
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.weights import WEIGHTS
from ssd_jax.runtime import sharding
from tests.support import QUICK_FLAGS, ROOT


def on_eight_devices(*args):
  """What the script prints; XLA's flags of this process are not handed on."""
  environment = os.environ | {
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8" + (
          "" if args else QUICK_FLAGS),
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if args else "1",
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  out = subprocess.run(
      [sys.executable, "-m", "tests.support.eight_devices", *args],
      env=environment, check=True, capture_output=True, text=True)
  return json.loads(out.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
  """All that the script finds, by programs that are optimised little."""
  return on_eight_devices()


@pytest.mark.slow
def test_a_mesh_generates_the_same_tokens():
  """A decoder of many queries, float32, token for token, on a mesh that shares
  rows and weights in both ways, by programs with all of XLA's optimisations."""
  assert on_eight_devices("tokens") == [1.0]


@pytest.mark.slow
def test_a_pass_sends_what_it_must(found):
  """Two sums a layer, however rows are shared; embeddings and logits once."""
  totals, _ = found["sent"]["tensor=4"]
  layers, programs = 2, 2  # prefill and pass
  assert totals == {"all-reduce": programs * 2 * layers,
                    "all-gather": programs * 2}
  for _, within in found["sent"].values():
    assert within == ["all-reduce"] * 2 * programs


@pytest.mark.slow
def test_cores_share_the_streams_of_an_image(found):
  """Unasked, two devices of a CPU generate what one generates, where a pass has
  enough queries for two; they read the same weights."""
  assert found["cores"]["devices"] == {"ar": None, "stair": 2}
  assert found["cores"]["share"] == 1.0
  assert found["cores"]["places"] == 1


@pytest.mark.slow
def test_streams_apart_send_their_logits_alone(found):
  """One gathering of logits in the prefill, one in a pass, one where heads
  draft: what the streams share is computed by both."""
  kinds = {kind for kind, _ in found["cores"]["sent"]}
  assert kinds == {"all-gather"}


@pytest.mark.slow
def test_a_training_step_is_that_of_one_device(found):
  """Two steps of Muon and AdamW on every mesh, and in accumulated parts; two
  of heads and of a drafter."""
  assert found["step"] < 2e-5
  assert found["accumulated"] < 2e-5


@pytest.mark.slow
def test_optimiser_states_lie_with_their_parameters(found):
  """Moments and averages are cut as the weights are, and both are cut."""
  places = found["places"]
  for end in ("attn/q", "mlp/down", "embedding"):
    like = {place for name, place in places.items() if name.endswith(end)}
    assert len(like) == 1 and "tensor" in like.pop()
  assert sum(name.endswith("attn/q") for name in places) >= 3


@pytest.mark.slow
def test_a_shape_that_does_not_divide_says_what_would(found):
  """One line: which dimension, and the next smaller size that fits."""
  assert "to divide 4" in found["error"] and "attn/" in found["error"]
  assert "Use tensor=4" in found["error"]


@pytest.mark.parametrize("text", ["batch=2", "tensor", "data=0", "tensor=9999"])
def test_bad_meshes_end_in_one_line(text):
  """Unknown axes, sizes that are none, more devices than there are."""
  with pytest.raises(UserError, match="Expected .*got .*mesh"):
    sharding.make_mesh(text)


def test_the_mesh_flag_makes_devices_of_a_cpus_cores():
  """--mesh data=2 works on a CPU as it is; no more devices than cores."""
  code = ("from ssd_jax.cli import run; import jax\n"
          "run._split_cpu(2); print(len(jax.devices()))\n"
          "run._split_cpu(9); print(len(jax.devices()))")  # too late: no error
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  out = subprocess.run([sys.executable, "-c", code], env=environment,
                       check=True, capture_output=True, text=True)
  assert out.stdout.split() == [str(min(2, os.cpu_count()))] * 2


def test_every_parameter_of_a_rule_exists():
  """Every row of the table names a parameter of some model."""
  from ssd_jax.pipeline import testing

  params = testing.tiny().params
  paths = ["/" + jax.tree_util.keystr(path, simple=True, separator="/")
           for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  other = {"head_in", "head_in_bias", "head_bias", "caption_in", "caption_out",
           "narrow", "attn/q_bias", "attn/k_bias", "attn/v_bias",
           }  # of some families alone
  for end in WEIGHTS:
    assert end in other or any(p.endswith(f"/{end}") for p in paths), end
