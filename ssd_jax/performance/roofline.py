"""Measured memory bandwidth and arithmetic of a machine."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from ssd_jax.runtime import sharding

_SIDE = 1024  # side of the matrices whose product is timed


@dataclasses.dataclass(frozen=True)
class Machine:
  """Measured figures of a machine.

  Attributes:
    bandwidth: Bytes per second when reading as many bytes as a pass does.
    flops: Operations per second of a matrix product.
    dispatch: Seconds of calling a trivial program.
  """

  bandwidth: float
  flops: float
  dispatch: float


def seconds_of(
    function: Callable[[], Any], least: float = 0.2, most: int = 50
) -> float:
  """Returns the least seconds of a call, of five or more after the first.

  Args:
    function: Function to call.
    least: Total seconds of calls to reach.
    most: Largest number of calls.
  """
  jax.block_until_ready(function())
  times: list[float] = []
  while len(times) < 5 or (sum(times) < least and len(times) < most):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return min(times)


def measure_machine(size: float, dtype: Any) -> Machine:
  """Measures the default device, or all devices that share rows together.

  Args:
    size: Bytes that are read repeatedly, as passes read weights; a small array
      stays in a CPU's caches.
    dtype: Type of the matrices.
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
  # The better of two ways to read, because neither is best on every device.
  reading = min(seconds_of(lambda: product(matrix, vector)),
                seconds_of(lambda: total(matrix)))
  return Machine(
      matrix.nbytes / max(reading - dispatch, 1e-9),
      2 * _SIDE**3 / seconds_of(lambda: product(square_rows, square)), dispatch)
