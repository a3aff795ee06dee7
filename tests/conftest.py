"""Settings of the whole suite.

Most of its time goes into compiling programs that then run for milliseconds,
so they are compiled with few optimisations, and forgotten after each file:
every one holds memory maps, of which a process may have only so many.
"""

import functools
import gc

import jax
import pytest

jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Frees the programs that a file compiled, and what its caches hold."""
  yield
  for thing in gc.get_objects():
    if isinstance(thing, functools._lru_cache_wrapper) and (
        (thing.__module__ or "").startswith(("test", "toy_", "ssd_jax"))):
      thing.cache_clear()
  jax.clear_caches()
  gc.collect()
