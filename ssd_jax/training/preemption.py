"""Preemption: after SIGTERM, a run ends its step, saves and exits with 0."""

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

_queries = itertools.count(1)  # over the job; equal on all hosts


class Preemption:
  """Context manager around a job's steps that notices a request to stop.

  With several hosts, JAX's preemption service receives the signal and
  synchronises the hosts, so that `is_due` is true in the same step on all.
  """

  def __init__(self):
    self._signalled = threading.Event()
    self._before = None

  def __enter__(self) -> "Preemption":
    is_main = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and is_main:
      self._before = signal.signal(
          signal.SIGTERM, lambda number, frame: self._signalled.set())
    return self

  def __exit__(self, *error) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def is_due(self) -> bool:
    """Returns whether to save and stop now; all hosts call it once per step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(next(_queries))
    return self._signalled.is_set()
