"""Commands; Ctrl-C while one is being imported ends it without a traceback."""

import signal
import threading

if threading.current_thread() is threading.main_thread():
  signal.signal(signal.SIGINT, signal.SIG_DFL)
