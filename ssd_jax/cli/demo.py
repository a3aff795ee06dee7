"""Body of infer.demo: the live page."""

import socket

from absl import flags

from ssd_jax.cli import common, run as cli
from ssd_jax.core.config import UserError, check
from ssd_jax.core.extras import need
from ssd_jax.serving import server
from ssd_jax.serving.studio import Worker

common.define_flags(
    "batch", *common.MODEL)

_BATCH = 4
_LOCAL = ("127.0.0.1", "localhost", "::1")


def define_flags() -> None:
  """Defines the command's own flags."""
  flags.DEFINE_integer("port", 7860, "Port to listen on; 0 takes a free one.")
  flags.DEFINE_string(
      "host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets others in.")
  flags.DEFINE_string(
      "bench", None, "Folder of infer.benchmark whose plot is shown.")


def body() -> None:
  """Serves the page until it is interrupted."""
  values = flags.FLAGS
  uvicorn = need("uvicorn", "demo")
  need("starlette", "demo")
  check(0 <= values.port < 2**16, "port", values.port, "in [0, 65535]")
  batch = _BATCH if flags.FLAGS.batch is None else flags.FLAGS.batch
  check(batch >= 1, "batch", batch, ">= 1")
  listener = _listen(values.host, values.port)
  cli.use_compilation_cache()
  studio = Worker(common.load_pipeline(), batch)
  hosts = list(_LOCAL) if values.host in _LOCAL else ["*"]
  app = server.make_app(studio, hosts, values.bench)
  config = uvicorn.Config(app, log_level="warning", server_header=False)
  host = f"[{values.host}]" if ":" in values.host else values.host
  print(f"http://{host}:{listener.getsockname()[1]}  (Ctrl-C ends)", flush=True)
  try:
    uvicorn.Server(config).run([listener])
  finally:
    studio.close()


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
  cli.main(body)
