"""Several hosts that work as one: joining them, and ending together."""

import glob
import importlib.util
import os
import sys
import traceback
from typing import NoReturn

import jax

from ssd_jax.core.config import UserError

_HEARTBEAT_SECONDS = 30  # after which a host that is silent counts as dead


def join(
    coordinator: str | None = None, num_processes: int | None = None,
    process_id: int | None = None,
) -> bool:
  """Joins the hosts of a job, by itself on Cloud TPU and Slurm; whether there
  is one.

  Args:
    coordinator: HOST:PORT of the first process, elsewhere.
    num_processes: Of the job, elsewhere; 1 for this host alone, anywhere.
    process_id: Of this one, from 0, elsewhere.

  Raises:
    UserError: when only some of the three are given, or nobody answers.
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
        "Expected all three or none, got some of --coordinator, "
        "--num_processes and --process_id. Add the others.")
  if not 0 <= process_id < num_processes:
    raise UserError(
        f"Expected 0 to {num_processes - 1}, got --process_id {process_id}. "
        "Correct it or --num_processes.")
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process_id,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
  except (RuntimeError, ValueError) as error:
    raise UserError(
        "Expected HOST:PORT of process 0, which all others reach, got no job "
        f"at --coordinator {coordinator} ({_line(error)}). Start all "
        "processes."
    ) from error
  return True


def _is_pod() -> bool:
  """Whether JAX can find the hosts of this job by itself."""
  if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
    return "SLURM_PROCID" in os.environ
  has_chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(
      has_chips and importlib.util.find_spec("libtpu")
      and "cpu" not in os.environ.get("JAX_PLATFORMS", ""))


def end_with_error(error: BaseException) -> NoReturn:
  """Ends this process at once: its fellows notice, none waits for another."""
  traceback.print_exception(error)
  print(f"process {jax.process_index()} of {jax.process_count()} ends: "
        f"{_line(error)}; start the job again, it continues from what is "
        "saved", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)  # an orderly exit would wait for hosts that are gone


def _line(error: BaseException) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:160]
