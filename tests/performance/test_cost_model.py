"""Plans: counts by hand, by XLA and by generating agree; reports are
complete."""

import collections
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from ssd_jax.decoding import registry
from ssd_jax.families import emoji, lumina
from ssd_jax.performance import (
  compiled,
  cost_model as planning,
  pass_counts,
)
from ssd_jax.runtime import sharding
from tests.support import ROOT


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


def test_a_trunk_of_seven_billion_is_but_shapes():
  """Planning a large family makes no array of it."""
  network = planning.Network.of(lumina.get_config(), jnp.bfloat16)
  assert 6.5e9 < planning.count(network.params["trunk"]) < 7e9
  assert all(isinstance(x, jax.ShapeDtypeStruct)
             for x in jax.tree.leaves(network.params))


def test_the_page_shows_what_was_compiled():
  """docs/plan.md's tables are those of docs/plans.jsonl; only steps of
  train.mtp, which take long to compile, may be missing."""
  spec = importlib.util.spec_from_file_location(
      "plans", ROOT / "docs" / "plans.py")
  plans = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(plans)
  found = plans.kept()
  kinds = collections.Counter(kind for kind, *_ in found)
  assert kinds["draw"] == len(plans.CONFIGS) * len(plans.SLICES)
  assert kinds["images"] == len(plans.TRAINED) * len(plans.TRAINED_ON)
  assert kinds["train"] > 0
  assert plans.PAGE.read_text("utf-8").endswith(plans.tables(found))
