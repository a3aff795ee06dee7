"""Settings of the whole suite.

`python -m pytest` runs the quick tests, `python -m pytest --all` also those
marked slow and all cases of those marked `quick(n)`.

Most of the time goes into compiling programs that then run for milliseconds,
so XLA optimises them little. A test marked `as_users_compile` runs in a process
of its own, whose programs are compiled as users' are. Programs are freed after
each file, or sooner: every one holds memory maps, of which a process may have
only so many, and XLA crashes the process when it gets no more of them.

All processes of a run, also those that tests start, have one cache of compiled
programs. It is as old as the run: no test meets what earlier code compiled.
"""

import collections
import functools
import gc
import os
import pathlib
import subprocess
import sys
import tempfile

from tests.support import QUICK_FLAGS

_AS_USERS = "SSD_JAX_TESTS_COMPILE_AS_USERS"
_QUICK = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")

if _AS_USERS not in os.environ:  # before jax reads it
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + QUICK_FLAGS
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="ssd-jax-tests-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _cache.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

import jax  # noqa: E402
import pytest  # noqa: E402

_MAPS = pathlib.Path("/proc/self/maps")
_MOST = 30_000  # of the 65,530 that Linux allows


def pytest_addoption(parser):
  parser.addoption(
      "--all", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
  """Leaves out slow tests, unless they are asked for or named."""
  if config.getoption("--all") or config.option.markexpr or any(
      "::" in arg or "parity" in arg for arg in config.args):
    return
  seen, quick, slow = collections.Counter(), [], []
  for item in items:
    function = item.nodeid.partition("[")[0]
    seen[function] += 1
    cases = item.get_closest_marker("quick")
    is_slow = item.get_closest_marker("slow") or "/parity/" in item.nodeid or (
        cases and seen[function] > cases.args[0])
    (slow if is_slow else quick).append(item)
  config.hook.pytest_deselected(items=slow)
  items[:] = quick


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
    # `isinstance` would ask torch's deprecated objects for their class.
    if type(thing) is functools._lru_cache_wrapper and (
        (thing.__module__ or "").startswith(("tests.", "ssd_jax"))):
      thing.cache_clear()
  jax.clear_caches()
  gc.collect()


def pytest_pyfunc_call(pyfuncitem):
  """Runs a test marked `as_users_compile` in a process without our flags."""
  if _AS_USERS in os.environ or not pyfuncitem.get_closest_marker(
      "as_users_compile"):
    return None
  child = subprocess.run(
      [sys.executable, "-m", "pytest", "-q", "-n", "0", pyfuncitem.nodeid],
      cwd=pyfuncitem.config.rootpath, capture_output=True, text=True,
      env={k: v for k, v in os.environ.items() if k not in _QUICK}
      | {_AS_USERS: "1"})
  assert child.returncode == 0, child.stdout + child.stderr
  return True
