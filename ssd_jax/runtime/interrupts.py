"""Ctrl-C and SIGTERM, read by a thread of their own.

Python raises KeyboardInterrupt wherever its main thread happens to be: in a
callback of XLA that ends the process in a crash, in one of the garbage
collector it is lost, in a save it damages the save. Here the main thread hears
nothing. A thread ends the process, or leaves a request to code that can end
well; then a second signal ends the process.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import socket
import sys
import threading

import jax

_LONGEST = 10.0  # seconds that an end waits for a file being written

_writing = threading.RLock()
_deferring = 0
_requested: signal.Signals | None = None
_is_watched = False


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Ctrl-C ends the process with status 130, unless it is `deferred`.

  Outside the main thread, which alone may handle signals, nothing changes.
  """
  global _is_watched, _requested
  if _is_watched or threading.current_thread() is not threading.main_thread():
    yield
    return
  ours, systems = socket.socketpair()
  systems.setblocking(False)
  _is_watched, _requested = True, None
  handler = signal.signal(signal.SIGINT, _ignore)
  descriptor = signal.set_wakeup_fd(systems.fileno(), warn_on_full_buffer=False)
  reader = threading.Thread(target=_read, args=(ours,), daemon=True)
  reader.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(descriptor)
    signal.signal(signal.SIGINT, handler)
    _is_watched = False
    systems.close()  # ends the thread
    reader.join()
    ours.close()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """The first Ctrl-C or SIGTERM is a request; a second one ends the process.

  In a job of several hosts JAX hears SIGTERM, and Ctrl-C is passed on to it.
  """
  global _deferring
  is_main = threading.current_thread() is threading.main_thread()
  handler = None
  if is_main and not jax.distributed.is_initialized():
    handler = signal.signal(signal.SIGTERM, _ignore)
  with watched():
    _deferring += 1
    try:
      yield
    finally:
      _deferring -= 1
      if handler is not None:
        signal.signal(signal.SIGTERM, handler)


def requested() -> signal.Signals | None:
  """Returns the signal that asked this process to end, if any."""
  return _requested


@contextlib.contextmanager
def writing() -> Iterator[None]:
  """Delays the end of the process while this block writes or moves a file."""
  with _writing:
    yield


def _ignore(number, frame) -> None:
  """Handles a signal in the main thread: the other thread has read it."""


def _read(ours: socket.socket) -> None:
  while number := ours.recv(1):
    # Another handler, such as a web server's, takes what it was set for.
    if signal.getsignal(number[0]) is _ignore:
      _receive(signal.Signals(number[0]))


def _receive(number: signal.Signals) -> None:
  global _requested
  if _deferring and _requested is None:
    _requested = number
    if number == signal.SIGINT and jax.distributed.is_initialized():
      os.kill(os.getpid(), signal.SIGTERM)
  elif _deferring or number == signal.SIGINT:
    _end(number)


def _end(number: signal.Signals) -> None:
  """Ends the process at once: a regular exit would wait for threads of XLA."""
  _writing.acquire(timeout=_LONGEST)
  start = "\n" if sys.stderr.isatty() else ""
  os.write(2, f"{start}interrupted\n".encode())
  os._exit(128 + number)
