"""Progress callbacks, progress bars and timing."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
import tqdm


@dataclasses.dataclass(frozen=True)
class Progress:
  """A batch of images after a pass.

  Attributes:
    passes: Number of passes so far; 1 is the prefill.
    index: int32 [B], index of each image over the whole call.
    tokens: int32 [B, R, C], image tokens, drafts included.
    is_final: bool [B, R, C], which tokens are final.
  """

  passes: int
  index: np.ndarray
  tokens: np.ndarray
  is_final: np.ndarray

  @property
  def fraction(self) -> float:
    """Fraction of the tokens that are final, in [0, 1]."""
    return float(self.is_final.mean())


class Listener:
  """The callback of compiled programs, which forwards to the current one.

  A program is compiled for one callback function. A `Listener` is this function
  for all calls, so that another user callback needs no recompilation.
  """

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._on_pass: Callable[[Progress], None] | None = None
    self._count = 0

  def __call__(self, passes, index_B, tokens_BRC, is_final_BRC) -> None:
    """Forwards a pass to the current callback, without padding images."""
    if self._on_pass is not None:
      arrays = (np.asarray(x)[:self._count]
                for x in (index_B, tokens_BRC, is_final_BRC))
      self._on_pass(Progress(int(passes), *arrays))

  @contextlib.contextmanager
  def forward_to(
      self, on_pass: Callable[[Progress], None] | None, count: int
  ) -> Iterator[None]:
    """Forwards passes to `on_pass` inside the context.

    One callback is active at a time. Without a callback, the context does not
    wait for the device.

    Args:
      on_pass: The callback, or None.
      count: Number of images to report; the rest of the batch is padding.
    """
    if on_pass is None:
      yield
      return
    with self._lock:
      self._on_pass, self._count = on_pass, count
      try:
        yield
        jax.effects_barrier()
      finally:
        self._on_pass = None


class Bar(tqdm.tqdm):
  """A progress bar; in a log, one line per minute instead.

  Tasks that take less than a minute print nothing to a log.
  """

  MINUTE = 60.0

  def __init__(self, *args: Any, **kwargs: Any) -> None:
    self._is_log = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
    self._start = self._last_print = time.monotonic()
    super().__init__(
        *args, file=sys.stderr, leave=not self._is_log, **kwargs)

  def display(self, msg: str | None = None, pos: int | None = None) -> bool:
    """Shows the progress; in a log once per minute and at the end."""
    if not self._is_log:
      return super().display(msg, pos)
    now, is_end = time.monotonic(), msg is not None
    if now - (self._start if is_end else self._last_print) >= self.MINUTE:
      self._last_print = now
      print(self, file=self.fp, flush=True)
    return False

  def clear(self, nolock: bool = False) -> None:
    """Clears the bar; a log has none."""
    if not self._is_log:
      super().clear(nolock)


class Clock:
  """Measures the time since its creation, split into compiling and the rest.

  Attributes:
    compiling: Seconds spent compiling.
  """

  def __init__(self):
    self._start = time.perf_counter()
    self.compiling = 0.0

  def compile(self, function: Callable[..., Any], *args, **kwargs) -> Any:
    """Returns `function(*args, **kwargs)`; its time counts as compiling."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    self.compiling += time.perf_counter() - start
    return result

  def rest(self) -> float:
    """Returns the seconds not spent compiling."""
    return time.perf_counter() - self._start - self.compiling
