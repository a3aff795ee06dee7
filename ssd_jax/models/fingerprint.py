"""Knowing a trunk again by a few weights, kept beside what fits only it."""

from collections.abc import Sequence

import jax
import numpy as np

from ssd_jax.core.types import Params

_PROBES = 64


def fingerprint(trunk: Params) -> tuple[float, ...]:
  """Evenly spread weights of a trunk, a few of every array."""
  leaves = jax.tree.leaves(trunk)
  each = -(-_PROBES // len(leaves))
  values = []
  for leaf in leaves:
    flat = np.linspace(0, leaf.size - 1, each).astype(np.int64)
    values.append(leaf[np.unravel_index(flat, leaf.shape)])
  return tuple(
      float(f"{x:.6g}") for v in values for x in np.asarray(v, np.float32)
  )


def same_trunk(one: Sequence[float], other: Sequence[float]) -> bool:
  """Whether two fingerprints agree up to rounding; an empty one fits all."""
  if not one or not other:
    return True
  # Half of a last bit of bfloat16 is 0.2%; float16 flushes below 6e-8.
  return len(one) == len(other) and np.allclose(one, other, 0.006, 1e-7)
