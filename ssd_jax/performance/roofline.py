"""What a machine reads and multiplies in a second, measured."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from ssd_jax.runtime import sharding

_SIDE = 1024  # of the matrices whose product is timed


@dataclasses.dataclass(frozen=True)
class Machine:
  """What was measured beside the passes.

  Attributes:
    bandwidth: Bytes a second of reading as many bytes as a pass must.
    flops: Operations a second of a matrix product.
    dispatch: Seconds of calling a program that does nothing.
  """

  bandwidth: float
  flops: float
  dispatch: float


def seconds_of(
    function: Callable[[], Any], least: float = 0.2, most: int = 50
) -> float:
  """The best of calls after the first, of which there are at least five."""
  jax.block_until_ready(function())
  times: list[float] = []
  while len(times) < 5 or (sum(times) < least and len(times) < most):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return min(times)


def measure_machine(size: float, dtype: Any) -> Machine:
  """Figures of the default device, or of all that share rows together.

  Args:
    size: Bytes that are read again and again, as a pass reads its weights:
      small ones stay in a CPU's caches.
    dtype: Of the matrices.
  """
  rows = max(int(size) // (_SIDE * jnp.dtype(dtype).itemsize), 8)
  matrix, vector = jnp.ones((rows, _SIDE), dtype), jnp.ones(_SIDE, dtype)
  square = jnp.ones((_SIDE, _SIDE), dtype)
  matrix, square_rows, short = sharding.shard_rows(
      (matrix, square, jnp.ones((8, 8), dtype)))
  product = jax.jit(lambda a, b: a @ b)
  total = jax.jit(lambda a: jnp.sum(a, axis=1, dtype=jnp.float32))
  nothing = jax.jit(lambda a: a + 1)
  dispatch = seconds_of(lambda: nothing(short))
  # The best of two ways to read: neither is best on every device.
  reading = min(seconds_of(lambda: product(matrix, vector)),
                seconds_of(lambda: total(matrix)))
  return Machine(
      matrix.nbytes / max(reading - dispatch, 1e-9),
      2 * _SIDE**3 / seconds_of(lambda: product(square_rows, square)), dispatch)
