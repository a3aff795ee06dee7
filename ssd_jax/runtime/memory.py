"""Available device memory."""

import pathlib

import jax


def free_bytes() -> int | None:
  """Returns the free bytes of the first local device, or None if unknown."""
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  table = pathlib.Path("/proc/meminfo")
  if not table.is_file():
    return None
  lines = dict(line.split(":") for line in table.read_text().splitlines())
  return int(lines["MemAvailable"].split()[0]) * 1024
