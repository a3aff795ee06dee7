"""Settings of the whole suite.

Most of its time goes into compiling programs that then run for milliseconds,
so they are compiled with few optimisations, and forgotten after each file, or
sooner: every one holds memory maps, of which a process may have only so many,
and a compiler that gets no more of them takes the process down.
"""

import functools
import gc
import pathlib

import jax
import pytest

jax.config.update("jax_disable_most_optimizations", True)


_MAPS = pathlib.Path("/proc/self/maps")
_MOST = 30_000  # of the 65,530 that Linux allows


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
        (thing.__module__ or "").startswith(("test", "toy_", "ssd_jax"))):
      thing.cache_clear()
  jax.clear_caches()
  gc.collect()
