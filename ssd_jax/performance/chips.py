"""Figures of accelerators, and descriptions of slices that may be absent.

Peak figures of TPUs are Google's; `link` is both directions of one axis of the
torus, as rings use it. Prices are Google Cloud's list prices for on-demand use
in the US in 2025. Devices that are not in the table are measured for a second.
"""

import dataclasses
import importlib.util
import os
import time
from typing import Any

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from ssd_jax.core.config import UserError
from ssd_jax.performance import gpu_targets
from ssd_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    flops: bfloat16 operations per second.
    bandwidth: Memory bandwidth, bytes per second.
    memory: Bytes of memory.
    link: Bandwidth to a neighbour, bytes per second.
    dollars: Price per hour, or None.
  """

  flops: float
  bandwidth: float
  memory: float
  link: float
  dollars: float | None = None


# Keyed by prefixes of JAX's device_kind; the longest match counts.
_CHIPS = {
    "TPU v5 lite": Chip(197e12, 819e9, 15.75 * 2**30, 90e9, 1.20),
    "TPU v5": Chip(459e12, 2765e9, 95.74 * 2**30, 180e9, 4.20),
    "TPU v6 lite": Chip(918e12, 1640e9, 31.25 * 2**30, 180e9, 2.70),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039e9, 80e9, 600e9),
    "NVIDIA H100": Chip(989e12, 3350e9, 80e9, 900e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 141e9, 900e9),
    "NVIDIA L4": Chip(121e12, 300e9, 24e9, 64e9),
}
HOP_SECONDS = 1e-6  # latency of a collective's step from device to device


def chip_of(device: Any) -> Chip:
  """Returns the figures of a device; measures kinds that are not listed."""
  return _listed(device) or _measured(device)


def _listed(device: Any) -> Chip | None:
  fits = [kind for kind in _CHIPS if device.device_kind.startswith(kind)]
  return _CHIPS[max(fits, key=len)] if fits else None


def listed_flops() -> float | None:
  """Returns the FLOPs per second of the devices in use; None if not listed."""
  mesh = sharding.current()
  devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
  chip = _listed(devices[0])
  return chip.flops * len(devices) if chip else None


def devices_of(topology: str) -> list[Any]:
  """Returns the devices of a topology; "" means local devices.

  Args:
    topology: A slice of TPUs such as "v5e:2x4", or GPUs such as "h100:8".

  Raises:
    UserError: if the devices' compiler is missing or knows no such topology.
  """
  if not topology:
    return jax.devices()
  if gpu_targets.is_gpu(topology):
    return gpu_targets.devices_of(topology)
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
        f"Expected the TPU compiler, got --topology {topology} without "
        "libtpu. Run pip install 'ssd-jax[plan]'.")
  # Only shapes are handled here. libtpu only compiles; without these settings
  # it would look for chips and query Google Cloud's metadata.
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.replace(":", "-"))
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used
  try:
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology)
  except Exception as error:  # jaxlib raises several types
    reason = (str(error).splitlines() or [""])[0]
    raise UserError(
        "Expected TPUs such as v5e:2x4, v5p:2x2x1 or v6e:4x4, or GPUs such as "
        f"{' or '.join(gpu_targets.TARGETS)}, h100:8, got --topology "
        f"{topology} ({reason[:120]}).") from error
  return list(found.devices)


def _measured(device: Any) -> Chip:
  """Measures a matrix product and a copy, each as the best of a few runs."""
  side = 1024
  x = jax.device_put(jnp.ones((side, side)), device)
  long = jax.device_put(jnp.ones(2**25), device)
  flops = 2 * side**3 / _seconds(jax.jit(lambda x: x @ x), x)
  bandwidth = 2 * long.nbytes / _seconds(jax.jit(lambda x: x + 1), long)
  return Chip(flops, bandwidth, _memory(device), bandwidth)


def _seconds(function, x) -> float:
  times = []
  for _ in range(6):
    start = time.perf_counter()
    jax.block_until_ready(function(x))
    times.append(time.perf_counter() - start)
  return min(times[1:])


def _memory(device: Any) -> float:
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
