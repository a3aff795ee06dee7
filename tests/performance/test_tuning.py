"""infer.plan --measure: what is tried, and what is said of it."""

import json

import pytest

from ssd_jax.cli import plan
from ssd_jax.decoding import registry
from ssd_jax.performance import pass_counts, tuning
from ssd_jax.pipeline import testing
from tests.support import testkit as kit


@pytest.mark.slow
def test_what_is_tried_fits_the_grid_and_the_weights():
  """Decoders of texts that parse; without training only fixed schedules."""
  model = kit.chain(3, 4, end_of_row=True)
  names = tuning.candidates(model)
  decoders = [registry.parse(name) for name in names]
  assert names[0] == "ar" and len(set(names)) == len(names)
  assert any(x.lossless and x.name != "ar" for x in decoders)
  fixed = tuning.candidates(model, is_trained=False)
  assert set(fixed) < set(names)
  assert all(pass_counts.fixed_passes(registry.parse(x), model) for x in fixed)


@pytest.mark.slow
def test_what_is_measured_is_reported(monkeypatch, capsys):
  """Passes and queries of each, the fastest first; in JSON too."""
  pipe = testing.tiny(5, 4, 4, guidance=2.0)
  names = ["ar", "zipar:window=2", "sjd:window=4"]
  monkeypatch.setattr(tuning, "candidates", lambda *_: names)
  plan.measure(pipe, True, 3, True)
  *table, advice, line = capsys.readouterr().out.strip().splitlines()
  found = {x["decoder"]: x for x in json.loads(line)}
  assert list(found) == sorted(found, key=lambda name: -found[name]["ratio"])
  assert set(found) == set(names) and len(table) == 2 + len(names)
  assert found["ar"]["ratio"] == 1 and found["ar"]["passes"] == 16
  assert found["zipar:window=2"]["passes"] == pass_counts.fixed_passes(
      registry.parse("zipar:window=2"), pipe.model)
  assert [found[x]["queries"] for x in names] == [1, 3, 4]
  assert [found[x]["lossless"] for x in names] == [True, False, True]
  assert all(x["seconds"] > 0 for x in found.values())
  best = max(("ar", "sjd:window=4"), key=lambda name: found[name]["ratio"])
  assert advice.startswith(f"fastest lossless: {best},")
