"""Plans: counts by hand, by XLA and by drawing agree; reports are complete."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding import registry
from ssd_jax.families import emoji, lumina
from ssd_jax.performance import (
  chips,
  compiled,
  cost_model as planning,
  pass_counts,
  training_cost as training_plan,
)
from ssd_jax.runtime import sharding
from tests.support import ROOT, testkit as kit

FIELDS = {
    "family", "decoder", "settings", "topology", "devices", "mesh", "batch",
    "parameters", "memory_per_device", "fits", "bytes_per_pass",
    "flops_per_pass", "collectives", "roofline_ms", "passes", "image_seconds",
    "best"}
HLO = """HloModule m
%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.3 = f32[2,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}
  %ag = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%y), replica_groups=[1,4]<=[4]
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %done = bf16[4,8]{1,0} all-gather-done(%ag)
  %all-reduce.4 = f32[10]{0} all-reduce(%z), replica_groups={{0,1,2,3}}
  %cp.1 = f32[4]{0} collective-permute(%a), channel_id=7
  %cp.2 = f32[4]{0} collective-permute(%b), channel_id=7
  %rs = f32[4]{0} reduce-scatter(%c), channel_id=8, replica_groups=mesh['x'=2,'y'=2] {'y'}
}
"""  # noqa: E501


def test_collectives_of_loops_count_as_often_as_they_run():
  """Kinds, counts, bytes and groups of a text made by hand."""
  found = {x.kind: x for x in compiled.collectives(HLO, 4)}
  assert found["all-reduce"] == compiled.Collective(
      "all-reduce", 5 + 1, 5 * 32 + 40, 4)
  assert found["all-gather"] == compiled.Collective("all-gather", 5, 5 * 64, 4)
  assert found["collective-permute"].count == 1  # two steps of one
  assert found["reduce-scatter"].group == 2
  # A ring of 4 sends each byte 1.5 times.
  assert found["all-reduce"].seconds(1.0, 0.0) == pytest.approx(300)


@pytest.mark.parametrize("rounds", [0, 2])
def test_schedules_have_the_passes_and_queries_of_the_engine(rounds):
  """The formula against decoding itself, on a grid with row ends."""
  model = kit.chain(6, 7, end_of_row=True)
  found = pass_counts.of_rows(rounds, model)
  for text, passes, _ in (found[0], found[-1]):
    assert pass_counts.fixed_passes(registry.parse(text), model) == passes


@pytest.fixture(scope="module")
def network():
  """A trunk of the emoji's settings, small."""
  config = emoji.get_config()
  return planning.Network.of(config, jnp.float32)


def test_counts_by_hand_agree_with_xla(network):
  """FLOPs of a pass within a tenth; queries as the schedule says."""
  mesh = sharding.make_mesh("", jax.devices()[:1])
  plan = planning.Plan(
      network, registry.parse("ssd:rounds=2+schedule=pipelined+lag=1"), mesh, 1)
  [(_, _, queries)] = [
    x for x in pass_counts.of_rows(2, network.model) if x[0].endswith("lag=1")
  ]
  assert plan.queries == queries
  one, ends = plan.compile_pass()
  flops, moved = planning.xla_counts(
      one, ends, network.generator.cfg.n_layers, 1)
  by_hand = plan.counts(plan.queries)
  assert by_hand[0] == pytest.approx(flops, rel=0.1)
  assert by_hand[1] < 3 * moved  # without fusion XLA moves more
  assert compiled.collectives(one.as_text(), 1) == []


def test_a_step_of_training_is_planned(network):
  """What fits at once is accumulated to the batch; a small chip fits none."""
  config = emoji.get_config("smoke")
  mesh = sharding.make_mesh("", jax.devices()[:1])
  chip = chips.Chip(1e12, 1e11, 6e8, 1e9, 1.0)
  found = training_plan.report(network, config, mesh, chip, 64)
  assert found["fits"] and found["largest_batch"] > 0
  assert found["accumulate"] * found["largest_batch"] >= 64
  assert found["memory_per_device"] <= chip.memory
  assert found["step_seconds"] > 0 and found["dollars"] is not None
  small = chips.Chip(1e12, 1e11, 1e6, 1e9, 1.0)
  found = training_plan.report(network, config, mesh, small, 64)
  assert not found["fits"] and found["largest_batch"] == 0


@pytest.mark.parametrize("bend", [0.0, 0.4])
def test_the_largest_batch_is_found_in_few_programs(bend):
  """Of a memory that is a line, exactly; of a bent one, to an eighth."""
  tried = []

  @functools.cache
  def needed(batch):
    tried.append(batch)
    return 800 + batch + int(bend * max(batch - 200, 0))

  assert training_plan.largest(needed, 4, 700.0) == (804, 0)
  tried.clear()
  _, found = training_plan.largest(needed, 4, 2000.0)
  assert len(tried) <= 12
  best = max(n for n in range(4, 1300, 4) if needed(n) <= 2000)
  assert best * 7 / 8 <= found <= best and (bend or found == best)
  assert needed(found) <= 2000


def plan_of(*args):
  """(exit status, stdout, stderr) of infer.plan."""
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  done = subprocess.run(
      [sys.executable, "-m", "infer.plan", *args], cwd=ROOT, env=environment,
      capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


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


@pytest.mark.parametrize("args", [
    ["--mesh=tensor=3"], ["--batch=0"], ["--train", "--batch=-1"]])
def test_bad_plans_are_one_line(args):
  """What does not divide, exist or make sense."""
  status, _, err = plan_of(*args)
  assert status == 2 and "expected" in err.splitlines()[-1]


def test_a_trunk_of_seven_billion_is_but_shapes():
  """Planning a large family makes no array of it."""
  network = planning.Network.of(lumina.get_config(), jnp.bfloat16)
  assert 6.5e9 < planning.count(network.params["trunk"]) < 7e9
  assert all(isinstance(x, jax.ShapeDtypeStruct)
             for x in jax.tree.leaves(network.params))


def test_the_page_shows_what_was_compiled():
  """docs/plan.md's tables are those of docs/plans.jsonl, no row is missing."""
  spec = importlib.util.spec_from_file_location(
      "plans", ROOT / "docs" / "plans.py")
  plans = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(plans)
  found = plans.kept()
  drawn = len(plans.CONFIGS) * len(plans.SLICES)
  assert len(found) == drawn + len(plans.TRAINED) * len(plans.TRAINED_ON)
  assert plans.PAGE.read_text("utf-8").endswith(plans.tables(found))


def test_unknown_slices_are_one_line():
  """A word that is no topology, with or without the compiler."""
  with pytest.raises(UserError, match="got --topology v9z:1x1"):
    chips.devices_of("v9z:1x1")
