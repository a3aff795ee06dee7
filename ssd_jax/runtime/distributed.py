"""Multi-host jobs: joining the hosts, and exiting together."""

from collections.abc import Callable
import glob
import importlib.util
import os
import sys
import traceback
from typing import NoReturn, TypeVar

import jax
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.runtime import sharding

T = TypeVar("T")

_HEARTBEAT_SECONDS = 30  # a host that is silent for longer counts as dead


def join(
    coordinator: str | None = None, num_processes: int | None = None,
    process_id: int | None = None,
) -> bool:
  """Joins the hosts of a multi-host job.

  On Cloud TPU and Slurm the hosts are found automatically; elsewhere all three
  arguments are needed.

  Args:
    coordinator: HOST:PORT of the first process.
    num_processes: Number of processes; 1 runs this host alone everywhere.
    process_id: Index of this process, from 0.

  Returns:
    Whether there is a multi-host job.

  Raises:
    UserError: Only some arguments are given, or the coordinator is unreachable.
  """
  if num_processes == 1:
    return False
  given = (coordinator, num_processes, process_id)
  if all(x is None for x in given):
    if _is_pod():
      jax.distributed.initialize(
          heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    return jax.distributed.is_initialized()
  if coordinator is None or num_processes is None or process_id is None:
    raise UserError(
        "Expected all of --coordinator, --num_processes and --process_id or "
        "none, got some of them. Add the others.")
  if not 0 <= process_id < num_processes:
    raise UserError(
        f"Expected --process_id to be 0 to {num_processes - 1}, got "
        f"--process_id {process_id}. Change it or --num_processes.")
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process_id,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
  except (RuntimeError, ValueError) as error:
    raise UserError(
        "Expected --coordinator to be HOST:PORT of process 0, reachable from "
        f"all others, got no job at --coordinator {coordinator} "
        f"({_first_line(error)}). Start all processes."
    ) from error
  return True


def on_first_host(function: Callable[[], T]) -> T | None:
  """Returns `function()`, on the other hosts None.

  Raises:
    UserError: on all hosts, if the function raises it.
  """
  found, error = None, None
  if not jax.process_index():
    try:
      found = function()
    except UserError as raised:
      error = raised
  if sharding.broadcast_from_host0(np.int32(error is not None)):
    raise error or UserError(
        "Expected a first host that starts, got one that ends. See what it "
        "says.")
  return found


def _is_pod() -> bool:
  """Returns whether JAX can find the hosts of this job automatically.

  Raises:
    UserError: This is a Slurm allocation of several tasks, of which nothing
      has started the others.
  """
  tasks = os.environ.get("SLURM_NTASKS", "1")
  if tasks.isdecimal() and int(tasks) > 1:
    # srun sets these for its tasks; a script or shell has at most those of one.
    is_step = "SLURM_STEP_NODELIST" in os.environ and (
        os.environ.get("SLURM_STEP_NUM_TASKS", tasks) == tasks)
    if not is_step:
      raise UserError(
          f"Expected a command that srun starts {tasks} times, got one process "
          f"in a Slurm allocation of {tasks} tasks. Put srun before the "
          "command, or run it alone with --num_processes 1.")
    return True
  has_chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(
      has_chips and importlib.util.find_spec("libtpu")
      and "cpu" not in os.environ.get("JAX_PLATFORMS", ""))


def end_with_error(error: BaseException) -> NoReturn:
  """Exits this process at once, so that no other process waits for it."""
  traceback.print_exception(error)
  print(f"Process {jax.process_index()} of {jax.process_count()} exits: "
        f"{_first_line(error)}. Start the job again to resume from the last "
        "checkpoint.", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)  # a regular exit would wait for hosts that have exited


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:160]
