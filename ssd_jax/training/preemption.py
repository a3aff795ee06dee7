"""Being told to stop: SIGTERM lets the step end, saves, and exits with 0."""

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

_asked = itertools.count(1)  # over the whole job: every host asks as often


class Preemption:
  """Whether this job was told to stop; a context manager around its steps.

  Where there are several hosts, JAX's own service hears the signal and agrees
  with all of them on the question at which all are reported.
  """

  def __init__(self):
    self._told = threading.Event()
    self._before = None

  def __enter__(self) -> "Preemption":
    is_main = threading.current_thread() is threading.main_thread()
    if jax.process_count() == 1 and is_main:
      self._before = signal.signal(
          signal.SIGTERM, lambda number, frame: self._told.set())
    return self

  def __exit__(self, *error) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def is_due(self) -> bool:
    """Whether to save and stop now; asked once in every step, by all hosts."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(next(_asked))
    return self._told.is_set()
