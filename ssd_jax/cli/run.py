"""What all commands share: config, mesh, hosts, errors in one line."""

from collections.abc import Callable
import contextlib
import inspect
import io
import math
import os
import pathlib
import sys
from typing import NoReturn

from absl import flags
import jax
from ml_collections import config_flags

from ssd_jax.cli import model_list
from ssd_jax.core.config import UserError
from ssd_jax.runtime import distributed, interrupts, sharding
from ssd_jax.storage import files

_DEFAULT = pathlib.Path(__file__).parent.parent / "families" / "emoji.py"

MESH = flags.DEFINE_string(
    "mesh", "", "How devices share the work, such as data=2,fsdp=1,tensor=4; "
    "on a CPU each core can be a device. Default: one device; two CPU devices "
    "when generating; on several hosts, data over all devices.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, for several hosts outside "
    "Cloud TPU and Slurm.")
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the whole job; with --coordinator. "
    "1 is a single process.")
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0; with --coordinator.")


def define_config() -> None:
  """Defines --config FILE[:variant] and --config.key=value."""
  config_flags.DEFINE_config_file(
      "config", str(_DEFAULT),
      "Settings, such as configs/emoji.py or configs/emoji.py:smoke; override "
      "with --config.key=value.",
  )


def main(
    body: Callable[[], None], argv: list[str] | None = None,
    runs_here: bool = True, draws: bool = False,
) -> None:
  """Parses flags and runs `body`; a mistake ends in one line, status 2.

  Args:
    body: The command, called once the flags are parsed.
    argv: Arguments to parse instead of the program's.
    runs_here: Whether --mesh names devices of this machine.
    draws: Whether the command generates images, which two cores of a CPU may
      share.
  """
  argv = _with_home(sys.argv if argv is None else argv)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # any text on any terminal
      stream.reconfigure(errors="backslashreplace")
  if {"-h", "-help", "--help", "--helpfull"} & set(argv[1:]):
    print(_help(body))
    return
  try:
    rest = flags.FLAGS(argv)
    _ = flags.FLAGS.config.family  # fails here if the file does
  except Exception as error:  # a config is a program
    fail(_bad_flag(error, argv))
  if len(rest) > 1:
    fail(f"Expected flags only, got argument {rest[1]!r}. See --help.")
  if "model" in flags.FLAGS and flags.FLAGS.model == "list":
    body = model_list.show
  try:
    with interrupts.watched(), (
        devices(draws) if runs_here else contextlib.nullcontext()):
      body()
  except UserError as error:
    fail(str(error))
  except OSError as error:  # such as a full disk
    fail(f"Expected files that can be read and written, got {error}. Check "
         "the path and the disk.")


def _with_home(argv: list[str]) -> list[str]:
  """Returns the arguments with ~ expanded, which no shell does behind --x=."""
  found = list(argv)
  for i, arg in enumerate(argv):
    name, equals, value = arg.partition("=") if arg[:1] == "-" else (
        argv[i - 1], "", arg)
    if value[:1] == "~" and name.lstrip("-") != "prompt":
      found[i] = (name if equals else "") + equals + os.path.expanduser(value)
  return found


def _help(body: Callable[[], None]) -> str:
  """Returns the text of --help: the command, its flags, the shared flags."""
  module = sys.modules[body.__module__]
  package = __package__ or ""
  names = sorted(
      (name for name in flags.FLAGS.flags_by_module_dict()
       if name.startswith(package)),
      key=lambda name: name != module.__name__)
  parts = [inspect.getdoc(body), inspect.getdoc(module)]
  parts += [flags.FLAGS.module_help(name) for name in names]
  return "\n\n".join(filter(None, parts))


@contextlib.contextmanager
def devices(draws: bool):
  """Joins the hosts and sets the mesh that the flags ask for.

  Args:
    draws: Whether the command generates images; see `main`.
  """
  is_job = distributed.join(
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  is_alone = not is_job or jax.process_count() == 1
  if is_alone and not MESH.value:
    if draws and not is_job:
      _split_cpu(2)  # one for each guidance stream: see sharding.cpu_mesh
    yield
    return
  if not is_job:
    _split_cpu(math.prod(sharding.parse(MESH.value).values()))
  with jax.set_mesh(sharding.make_mesh(MESH.value)):
    try:
      yield
    except Exception as error:
      if is_alone or isinstance(error, UserError):
        raise
      distributed.end_with_error(error)


def _split_cpu(count: int) -> None:
  """Makes devices of the CPU's cores, unless their number is set already."""
  xla_flag = "xla_force_host_platform_device_count"
  if xla_flag in os.environ.get("XLA_FLAGS", "") or (
      getattr(jax.config, "jax_num_cpu_devices", 0) > 0):
    return
  cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
           else os.cpu_count() or 1)
  with contextlib.suppress(RuntimeError):  # JAX has started
    jax.config.update("jax_num_cpu_devices", min(count, cores))


def use_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder between runs."""
  folder = files.cache_folder()
  if folder is None:
    print("note: compiled programs are not kept, because there is no cache "
          "folder that can be written; set XDG_CACHE_HOME", file=sys.stderr)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def refuse_unused(*used: str) -> None:
  """Raises UserError for a --config.key=value that the command does not read.

  Args:
    *used: Keys that the command reads, with all that is below them.
  """
  for key in config_flags.get_override_values(flags.FLAGS["config"]):
    if not any(f"{key}.".startswith(f"{name}.") for name in used):
      raise UserError(
          f"Expected a key of {', '.join(sorted(used))}, got --config.{key}, "
          "which this command does not read. Leave it out.")


def fail(message: str) -> NoReturn:
  """Ends the program with one line on stderr and status 2."""
  sys.stdout.flush()
  print(" ".join(message.split()), file=sys.stderr)
  sys.exit(2)


def _bad_flag(error: BaseException, argv: list[str]) -> str:
  """Returns what is wrong with the flags or the config."""
  message = _first_line(error)
  key = message.strip("\"'")
  for name in (arg.partition("=")[0] for arg in argv):
    if isinstance(error, (AttributeError, KeyError)) and (
        name.startswith("--config.") and key in name.split(".")):
      return (f"Expected a key that the config's file sets, got {name}; the "
              f"config has no {key}.")
  if not isinstance(error, flags.Error) or message.endswith(":"):
    while message.endswith(":") and (
        cause := error.__cause__ or error.__context__):
      error, message = cause, _first_line(cause)
    if "xpected" in message:
      return message
    message = f"--config, {type(error).__name__}: {message}"
    if isinstance(error, OSError):  # the flag raises it when it is read
      name = config_flags.get_config_filename(flags.FLAGS["config"])
      message = f"--config {name}, which cannot be read"
  return f"Expected valid flags (see --help), got {message}."


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
