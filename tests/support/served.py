"""A server of this process, for tests that ask it over HTTP."""

import contextlib
import socket
import threading
import time

import uvicorn

from ssd_jax.decoding import registry
from ssd_jax.serving.app import make_app
from ssd_jax.serving.batches import Batches
from ssd_jax.serving.metrics import Metrics
from ssd_jax.serving.requests import Limits, Served
from ssd_jax.serving.scheduler import Scheduler


def scheduler_of(pipe, decoders=("ar",), batch=4, any_decoder=False, **limits):
  """A scheduler that is ready."""
  height, width = pipe.image_shape[:2]
  served = Served(
      (pipe.family.name, "gpt-image-1"), f"{width}x{height}",
      {name: registry.parse(name) for name in decoders},
      registry.parse if any_decoder else None, Limits(**limits))
  scheduler = Scheduler(pipe, served, Batches(pipe, batch), Metrics())
  while not scheduler.is_ready:
    assert scheduler.is_alive
    time.sleep(0.01)
  return scheduler


@contextlib.contextmanager
def site(pipe, *args, key=None, bench=None, **kwargs):
  """(address, scheduler) of a server on a port of its own."""
  scheduler = scheduler_of(pipe, *args, **kwargs)
  app = make_app(scheduler, pipe, ["127.0.0.1"], key, bench)
  listener = socket.socket()
  listener.bind(("127.0.0.1", 0))
  web = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
  thread = threading.Thread(target=web.run, args=([listener],), daemon=True)
  thread.start()
  while not web.started:
    time.sleep(0.01)
  try:
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", scheduler
  finally:
    web.should_exit = True
    thread.join()
    scheduler.close()
