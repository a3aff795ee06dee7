"""The page on a free port of this process, for the checks beside this file."""

import contextlib
import socket
import threading
import time

import uvicorn

import ssd_jax
from ssd_jax.serving import server
from ssd_jax.serving.studio import Worker
from tests.support import chains


@contextlib.contextmanager
def page(model: str, bench: str | None = None):
  """(address, studio) of a page with "greys", "emoji" or a model folder."""
  pipe = chains.pipeline(8, 8, 32) if model == "greys" else ssd_jax.load(model)
  studio = Worker(pipe)
  listener = socket.socket()
  listener.bind(("127.0.0.1", 0))
  app = server.make_app(studio, ["127.0.0.1"], bench)
  server_ = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
  thread = threading.Thread(
      target=server_.run, args=([listener],), daemon=True)
  thread.start()
  while not server_.started:
    time.sleep(0.01)
  try:
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", studio
  finally:
    server_.should_exit = True
    thread.join()
    studio.close()
