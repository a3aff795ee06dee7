"""How whoever waits is told how far it is: pictures pass by pass, and bars."""

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
  """Pictures being drawn together, as they are after a pass.

  Attributes:
    passes: So far; 1 is the prefill.
    index: int32 [B], of each picture over the whole call.
    tokens: int32 [B, R, C], drafts included.
    is_final: bool [B, R, C].
  """

  passes: int
  index: np.ndarray
  tokens: np.ndarray
  is_final: np.ndarray

  @property
  def fraction(self) -> float:
    """Of the cells that are final, in [0, 1]."""
    return float(self.is_final.mean())


class Listener:
  """What a compiled program calls, whoever listens at the time.

  A program is compiled with the function that it calls. This is that function
  for all calls, so that another listener compiles nothing anew.
  """

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._on_pass: Callable[[Progress], None] | None = None
    self._count = 0

  def __call__(self, passes, index_B, tokens_BRC, is_final_BRC) -> None:
    """Tells who listens of a pass; images that fill the batch are left out."""
    if self._on_pass is not None:
      arrays = (np.asarray(x)[:self._count]
                for x in (index_B, tokens_BRC, is_final_BRC))
      self._on_pass(Progress(int(passes), *arrays))

  @contextlib.contextmanager
  def forward_to(
      self, on_pass: Callable[[Progress], None] | None, count: int
  ) -> Iterator[None]:
    """Tells `on_pass` of the first `count` images that are drawn inside.

    One listens at a time; without a function nothing is waited for.
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
  """A bar with the time left; a log gets it as a line a minute instead.

  What takes less than that leaves nothing in a log.
  """

  MINUTE = 60.0

  def __init__(self, *args: Any, **kwargs: Any) -> None:
    self._is_log = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
    self._start = self._told = time.monotonic()
    super().__init__(
        *args, file=sys.stderr, leave=not self._is_log, **kwargs)

  def display(self, msg: str | None = None, pos: int | None = None) -> bool:
    """Shows how far it is; in a log when it is time, and at the end."""
    if not self._is_log:
      return super().display(msg, pos)
    now, is_end = time.monotonic(), msg is not None
    if now - (self._start if is_end else self._told) >= self.MINUTE:
      self._told = now
      print(self, file=self.fp, flush=True)
    return False

  def clear(self, nolock: bool = False) -> None:
    """Makes room for another line, which a log has."""
    if not self._is_log:
      super().clear(nolock)


class Clock:
  """Splits the time since its making into compiling and the rest."""

  def __init__(self):
    self._start = time.perf_counter()
    self.compiling = 0.0

  def compile(self, function: Callable[..., Any], *args, **kwargs) -> Any:
    """What `function` returns, its time counted as compiling."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    self.compiling += time.perf_counter() - start
    return result

  def rest(self) -> float:
    """Seconds not spent compiling."""
    return time.perf_counter() - self._start - self.compiling
