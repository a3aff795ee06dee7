"""Training steps planned: memory, batch, accumulation."""

import functools

import jax
import jax.numpy as jnp
import pytest

from ssd_jax.families import emoji
from ssd_jax.performance import (
  chips,
  cost_model as planning,
  training_cost as training_plan,
)
from ssd_jax.runtime import sharding


@pytest.fixture(scope="module")
def network():
  """A trunk of the emoji's settings, small."""
  config = emoji.get_config()
  return planning.Network.of(config, jnp.float32)


@pytest.mark.slow
def test_a_step_of_training_is_planned(network):
  """Images, then steps: what fits at once is accumulated to the batch; a small
  chip fits none."""
  config = emoji.get_config("smoke")
  mesh = sharding.make_mesh("", jax.devices()[:1])
  chip = chips.Chip(1e12, 1e11, 6e8, 1e9, 1.0)
  found = training_plan.whole(network, config, mesh, chip, 64)
  assert found["fits"] and found["largest_batch"] > 0
  assert found["accumulate"] * found["largest_batch"] >= 64
  assert found["memory_per_device"] <= chip.memory
  assert found["step_seconds"] > 0 and found["train_hours"] >= 0
  drawn, most = found["draw_batch"], found["draw_largest_batch"]
  assert found["draw_passes_assumed"] and 50 < found["draw_passes"] < 80
  assert drawn["fits"] and most["batch"] > drawn["batch"] == 16
  assert 0 < most["hours"] <= drawn["hours"] == found["draw_hours"]
  hours = found["draw_hours"] + found["train_hours"]
  assert found["hours"] == pytest.approx(hours, abs=1e-3)
  assert found["dollars"] == pytest.approx(hours, abs=0.01)  # a dollar an hour
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
