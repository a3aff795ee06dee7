"""NVIDIA GPUs that programs are compiled for without having one.

XLA needs no driver to compile, but a description of the device. The figures are
those of NVIDIA's data sheets and of the descriptions that XLA comes with
(xla/backends/gpu/target_config/specs).
"""

import ctypes
import dataclasses
import importlib.util
import os
import pathlib
import re
from typing import Any

import jax
from jax.experimental import topologies

from ssd_jax.core.config import UserError

_PATTERN = re.compile(r"([a-z]+\d+)(?::([1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class Target:
  """A GPU as XLA describes it.

  Attributes:
    name: JAX's device_kind.
    capability: Compute capability (major, minor).
    cores: Streaming multiprocessors.
    units: FP32 units per core.
    threads: Threads per core.
    shared: Bytes of shared memory per core, and the most that one block gets.
    l2: Bytes of the L2 cache.
    clock: GHz.
    memory: Bytes of memory.
    bandwidth: Bytes per second.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  units: int
  threads: int
  shared: tuple[int, int]
  l2: int
  clock: float
  memory: int
  bandwidth: int

  def text(self) -> str:
    """Returns the description as XLA parses it (GpuTargetConfigProto)."""
    major, minor = self.capability
    per_core, per_block = self.shared
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32
          shared_memory_per_block: 49152 shared_memory_per_core: {per_core}
          threads_per_core_limit: {self.threads} core_count: {self.cores}
          fpus_per_core: {self.units}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
          thread_dim_limit_z: 64
          memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2}
          clock_rate_ghz: {self.clock} device_memory_size: {self.memory}
          shared_memory_per_block_optin: {per_block}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
        device_description_str: "{self.name}"
        """


_HOPPER: dict[str, Any] = dict(
    capability=(9, 0), cores=132, units=128, threads=2048,
    shared=(233472, 232448), l2=52428800, clock=1.98)
TARGETS = {
    "h100": Target("NVIDIA H100 80GB HBM3", memory=84942979072,
                   bandwidth=3352320000000, **_HOPPER),
    "h200": Target("NVIDIA H200", memory=151397597184,
                   bandwidth=4800000000000, **_HOPPER),
    "a100": Target(
        "NVIDIA A100-SXM4-80GB", (8, 0), cores=108, units=64, threads=2048,
        shared=(167936, 166912), l2=41943040, clock=1.41, memory=85100068864,
        bandwidth=2039040000000),
    "l4": Target(
        "NVIDIA L4", (8, 9), cores=58, units=128, threads=1536,
        shared=(102400, 101376), l2=50331648, clock=2.04, memory=23609475072,
        bandwidth=300096000000),
}


def is_gpu(topology: str) -> bool:
  """Returns whether a topology names GPUs, such as "h100" or "h100:8"."""
  return topology.partition(":")[0] in TARGETS


def devices_of(topology: str) -> list[Any]:
  """Returns the devices of a topology such as "h100:8"; none need be there.

  Raises:
    UserError: if the count is wrong or the CUDA compiler is missing.
  """
  found = _PATTERN.fullmatch(topology)
  if found is None:
    raise UserError(
        f"Expected KIND or KIND:COUNT such as h100:8, got --topology "
        f"{topology}.")
  kind, count = found[1], int(found[2] or 1)
  if importlib.util.find_spec("jax_cuda13_plugin") is None:
    raise UserError(
        f"Expected the CUDA compiler, got --topology {topology} without "
        "jax-cuda13-plugin. Run pip install 'ssd-jax[plan-cuda]'.")
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver
  jax.config.update("jax_platforms", "cpu")
  _load_libraries()
  jax.devices()  # registers the plugin's topologies
  described = topologies.get_topology_desc(
      platform="cuda", topology_name="", topology=f"1x1x{count}",
      target_config=TARGETS[kind].text())
  return list(described.devices)


def _load_libraries() -> None:
  """Loads NVIDIA's libraries, which the compiler would look for on the path."""
  spec = importlib.util.find_spec("nvidia")
  folders = spec.submodule_search_locations if spec else ()
  left = [file for folder in folders or ()
          for file in pathlib.Path(folder).rglob("*.so*")]
  while left:  # some need others, in no order that their names tell
    failed = []
    for file in left:
      try:
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
      except OSError:
        failed.append(file)
    if len(failed) == len(left):
      return  # what these need is the driver's
    left = failed
