"""Commands; Ctrl-C while one is being imported ends it in one line."""

import os
import signal
import threading


def _end(number, frame) -> None:
  """Ends the process: an exception could be lost in a module's import."""
  os.write(2, b"interrupted\n")
  os._exit(128 + number)


if threading.current_thread() is threading.main_thread():
  signal.signal(signal.SIGINT, _end)
