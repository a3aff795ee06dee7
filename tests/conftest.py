"""Settings of the whole suite.

`python -m pytest` runs the quick tests, `python -m pytest --all` also those
marked slow.

Most of the time goes into compiling programs that then run for milliseconds,
so they are compiled with few optimisations; tests marked `as_users_compile`
have them compiled with all. They are freed after each file, or sooner: every
program holds memory maps, of which a process may have only so many, and XLA
crashes the process when it gets no more of them.
"""

import functools
import gc
import pathlib

import jax
import pytest

jax.config.update("jax_disable_most_optimizations", True)

_MAPS = pathlib.Path("/proc/self/maps")
_MOST = 30_000  # of the 65,530 that Linux allows


def pytest_addoption(parser):
  parser.addoption(
      "--all", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
  if config.getoption("--all") or config.option.markexpr:
    return
  slow = [item for item in items if item.get_closest_marker("slow")]
  # A test that is named, rather than found in a folder or file, is meant.
  named = any("::" in arg for arg in config.args)
  if slow and not named:
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def keep_maps_few():
  """Forgets what jax compiled when it holds half of the maps there are."""
  if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Frees the programs that a file compiled, and what its caches hold."""
  yield
  for thing in gc.get_objects():
    if isinstance(thing, functools._lru_cache_wrapper) and (
        (thing.__module__ or "").startswith(("tests.", "ssd_jax"))):
      thing.cache_clear()
  jax.clear_caches()
  gc.collect()


@pytest.fixture(autouse=True)
def compile_as_users_do(request):
  """All of XLA's optimisations, for a test marked `as_users_compile`."""
  if request.node.get_closest_marker("as_users_compile") is None:
    yield
    return
  jax.clear_caches()
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
  jax.clear_caches()
