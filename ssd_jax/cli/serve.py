"""Body of infer.serve: OpenAI's Images API, and the live page."""

from collections.abc import Sequence
import os
import pathlib
import signal
import socket
import threading
from typing import Any, NamedTuple

from absl import flags
import jax

from ssd_jax.cli import common, run as cli
from ssd_jax.core.config import UserError, check
from ssd_jax.core.extras import need
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding import registry
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import distributed, interrupts
from ssd_jax.serving import app as app_lib
from ssd_jax.serving.batches import Batches
from ssd_jax.serving.metrics import Metrics
from ssd_jax.serving.requests import Limits, Served
from ssd_jax.serving.scheduler import Scheduler

common.define_flags("batch", *common.MODEL)

_BATCH = 4
_LOCAL = ("127.0.0.1", "localhost", "::1")
_KEY = "SSD_JAX_API_KEY"
_IDLE = 5  # seconds that an idle connection is kept
_TO_SEND = 5  # seconds after the drain in which clients take their replies


def define_flags(
    port: int = 8000, decoders: str = "exact,stair,ar",
    any_decoder: bool = False,
) -> None:
  """Defines the command's own flags.

  Args:
    port: Default port.
    decoders: Default decoders.
    any_decoder: Whether other decoders are served unless flags say so.
  """
  flags.DEFINE_integer("port", port, "Port to listen on; 0 takes a free one.")
  flags.DEFINE_string(
      "host", "127.0.0.1", "Address to bind; 0.0.0.0 lets other machines in, "
      f"and needs a key in the environment variable {_KEY}.")
  flags.DEFINE_string(
      "bench", None, "Folder of infer.benchmark whose plot the page shows.")
  flags.DEFINE_string(
      "decoders", decoders, "Decoders, separated by commas, that are compiled "
      "before the server is ready; the first is the default.")
  flags.DEFINE_bool(
      "any_decoder", any_decoder, "Serve any other decoder too; each is "
      "compiled when it is first asked for.")
  flags.DEFINE_list(
      "aliases", "", "Further names of the model, such as gpt-image-1 for "
      "clients that cannot name another.")
  flags.DEFINE_integer("max_waiting", 256, "Maximum number of queued images.")
  flags.DEFINE_integer(
      "max_images", 10, "Maximum number of images per request.")
  flags.DEFINE_float(
      "timeout", 300.0, "Seconds until a request times out.")
  flags.DEFINE_float(
      "drain", 30.0, "Seconds to finish requests after SIGTERM.")


class _Door(NamedTuple):
  """What the first host alone needs, checked before the model is loaded."""

  key: str | None
  bench: app_lib.Bench
  listener: socket.socket


def body() -> None:
  """Serves images until SIGTERM or Ctrl-C; requests that run are finished."""
  for module in ("uvicorn", "starlette", "prometheus_client"):
    need(module, "serve")
  values = flags.FLAGS
  batch = _BATCH if values.batch is None else values.batch
  check(batch >= 1, "batch", batch, ">= 1")
  check(0 <= values.port < 2**16, "port", values.port, "in [0, 65535]")
  check(values.drain >= 0, "drain", values.drain, ">= 0")
  decoders, limits = _decoders(), _limits()
  door = distributed.on_first_host(_open_door)
  cli.use_compilation_cache()
  pipe = common.load_pipeline()
  for label, decoder in decoders.items():
    try:
      pipe.num_queries(decoder, ["a"])
    except UserError as error:
      raise UserError(
          f"{str(error).rstrip('.')}, from --decoders {label}.") from error
  batches = Batches(pipe, batch)
  if door is None:
    with interrupts.deferred():  # the first host drains, and says when to end
      batches.follow()
    return
  try:
    _serve(pipe, _served(pipe, decoders, limits), batches, door)
  finally:
    batches.end()  # or the other hosts would wait


def _serve(
    pipe: Pipeline, served: Served, batches: Batches, door: _Door
) -> None:
  """Answers clients until a signal; runs on the first host."""
  uvicorn, values = need("uvicorn", "serve"), flags.FLAGS
  scheduler = Scheduler(pipe, served, batches, Metrics())
  hosts = list(_LOCAL) if values.host in _LOCAL else ["*"]
  app = app_lib.make_app(scheduler, pipe, hosts, door.key, door.bench)
  server = uvicorn.Server(uvicorn.Config(
      app, log_level="warning", server_header=False,
      timeout_keep_alive=_IDLE, timeout_graceful_shutdown=_TO_SEND,
      http="h11", ws="none", h11_max_incomplete_event_size=65_536))
  host = f"[{values.host}]" if ":" in values.host else values.host
  port = door.listener.getsockname()[1]
  print(f"http://{host}:{port}  (Ctrl-C ends)", flush=True)
  run_until_signal(server, scheduler, [door.listener], values.drain)
  if scheduler.is_compiling and jax.process_count() == 1:
    os._exit(0)  # a regular exit would wait for the compiler


def _open_door() -> _Door:
  values = flags.FLAGS
  return _Door(_key(values.host), app_lib.read_bench(values.bench),
               _listen(values.host, values.port))


def run_until_signal(
    server: Any, scheduler: Scheduler, sockets: Sequence[socket.socket],
    seconds: float,
) -> None:
  """Runs a server; the first signal drains it, the second ends it at once.

  Args:
    server: The uvicorn.Server.
    scheduler: Generates the images.
    sockets: Where the server listens.
    seconds: Time to drain.

  Raises:
    UserError: if the model cannot run a decoder that is always served.
  """
  asked = threading.Event()

  def drain() -> None:
    scheduler.drain(seconds)
    server.should_exit = True

  def end(number: int, frame: Any) -> None:
    if asked.is_set():
      os._exit(128 + number)
    asked.set()
    threading.Thread(target=drain, name="drain").start()

  def fail() -> None:
    server.should_exit = True

  server.capture_signals = lambda: _handling(end)
  scheduler.on_failure = fail
  if scheduler.failure is not None:  # before it was listened to
    fail()
  try:
    server.run(list(sockets))
  finally:
    scheduler.close()
  if scheduler.failure is not None:
    raise scheduler.failure


class _handling:
  """Context in which SIGTERM and Ctrl-C are handled by a function."""

  def __init__(self, function: Any):
    self._function = function
    self._before: dict[int, Any] = {}

  def __enter__(self) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
      self._before[number] = signal.signal(number, self._function)

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)


def _decoders() -> dict[str, Decoder]:
  """Returns the decoders that flags name."""
  text = flags.FLAGS.decoders
  labels = [x.strip() for x in text.split(",") if x.strip()]
  check(bool(labels), "decoders", text, "at least one decoder")
  return {label: registry.parse(label) for label in labels}


def _limits() -> Limits:
  """Returns the limits that flags set."""
  values = flags.FLAGS
  check(values.timeout > 0, "timeout", values.timeout, "> 0")
  for name in ("max_waiting", "max_images"):
    check(getattr(values, name) >= 1, name, getattr(values, name), ">= 1")
  return Limits(images=values.max_images, waiting=values.max_waiting,
                seconds=values.timeout)


def _served(
    pipe: Pipeline, decoders: dict[str, Decoder], limits: Limits
) -> Served:
  """Returns what the flags offer."""
  names = [_name(pipe), *(name for name in flags.FLAGS.aliases if name)]
  height, width = pipe.image_shape[:2]
  return Served(
      tuple(dict.fromkeys(names)), f"{width}x{height}", decoders,
      registry.parse if flags.FLAGS.any_decoder else None, limits)


def _name(pipe: Pipeline) -> str:
  """Returns the name that clients call the model by."""
  folder = common.model_name()
  return pathlib.Path(folder).resolve().name if folder else pipe.family.name


def _key(host: str) -> str | None:
  """Returns the server's key, which is needed where others are let in.

  Raises:
    UserError: if it is missing, or cannot be sent in a header.
  """
  key = os.environ.get(_KEY) or None
  if key is None and host not in _LOCAL:
    raise UserError(
        f"Expected a key in the environment variable {_KEY}, since --host "
        f"{host} lets other machines in, got none. Set one, or leave --host "
        "out.")
  if key and not (key.isascii() and key.isprintable() and " " not in key):
    raise UserError(
        f"Expected a key of visible ASCII characters in {_KEY}, which clients "
        "can send, got spaces, line ends or others in it.")
  return key


def _listen(host: str, port: int) -> socket.socket:
  """Returns a listening socket, opened before the model is loaded.

  Raises:
    UserError: when it cannot.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
  except OSError as error:
    listener.close()
    raise UserError(
        f"Expected a free port of this machine ({error.strerror}), got --host "
        f"{host} --port {port}. Choose another --port.") from error
  return listener


def main() -> None:
  """Console entry point."""
  cli.define_config()
  define_flags()
  cli.main(body, draws=True)
