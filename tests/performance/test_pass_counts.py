"""Passes and queries by formula are those of decoding."""

import pytest

from ssd_jax.decoding import registry
from ssd_jax.performance import (
  pass_counts,
)
from tests.support import testkit as kit


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 2])
def test_schedules_have_the_passes_and_queries_of_the_engine(rounds):
  """The formula against decoding itself, on a grid with row ends."""
  model = kit.chain(6, 7, end_of_row=True)
  found = pass_counts.of_rows(rounds, model)
  for text, passes, _ in (found[0], found[-1]):
    assert pass_counts.fixed_passes(registry.parse(text), model) == passes
