"""The examples in docstrings are what happens."""

import doctest
import importlib

import pytest

from tests.support import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "ssd_jax").rglob("*.py"))
    if ">>> " in path.read_text("utf-8")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name):
  """Every example gives what its docstring says."""
  found = doctest.testmod(importlib.import_module(name))
  assert found.attempted and not found.failed
