"""Fingerprints that identify the trunk that heads or a drafter belong to."""

from collections.abc import Sequence

import jax
import numpy as np

from ssd_jax.core.config import check
from ssd_jax.core.types import Params

_PROBES = 64


def fingerprint(trunk: Params) -> tuple[float, ...]:
  """Returns evenly spaced weights of a trunk, a few of every array."""
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
  """Returns whether fingerprints agree up to rounding; empty ones always do."""
  if not one or not other:
    return True
  # Half a unit in the last place of bfloat16 is 0.2%; float16 flushes values
  # below 6e-8 to zero.
  return len(one) == len(other) and np.allclose(one, other, 0.006, 1e-7)


def check_fingerprint(found: tuple) -> None:
  """Raises UserError unless a stored fingerprint is made of numbers."""
  check(all(type(x) in (int, float) for x in found), "trunk", found[:2],
        "a fingerprint of numbers")
