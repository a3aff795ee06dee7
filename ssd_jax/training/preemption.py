"""Preemption: after Ctrl-C or SIGTERM, a run ends its step, saves and exits."""

import contextlib
import itertools
import signal
import sys
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from ssd_jax.runtime import interrupts

_queries = itertools.count(1)  # over the job; equal on all hosts


class Preemption(contextlib.ExitStack):
  """Context manager around a job's steps that notices a request to stop.

  With several hosts, JAX's preemption service receives the signal and
  synchronises the hosts, so that `is_due` is true in the same step on all.
  """

  def __enter__(self) -> "Preemption":
    super().__enter__()
    self.enter_context(interrupts.deferred())
    return self

  def is_due(self) -> bool:
    """Returns whether to save and stop now; all hosts call it once per step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(next(_queries))
    return interrupts.requested() is not None

  def stop(self, kept: str) -> NoReturn:
    """Exits with 0 after SIGTERM, with 130 after Ctrl-C.

    Args:
      kept: What a next start continues from.
    """
    is_typed = interrupts.requested() == signal.SIGINT
    print(f"stopped by {'Ctrl-C' if is_typed else 'SIGTERM'}: {kept}; start "
          "again to continue", file=sys.stderr)
    raise SystemExit(130 if is_typed else 0)
