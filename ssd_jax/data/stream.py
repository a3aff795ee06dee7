"""Streams of batches by grain: shuffled, endless, resumable, deterministic."""

from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.runtime import sharding


def stream(
    source: Any,
    load: Callable[[Any, int, np.random.Generator], Any],
    batch: int,
    seed: int,
    shard: tuple[int, int] | None = None,
) -> grain.IterDataset:
  """An endless stream of this host's share of batches of examples.

  Every epoch is a fresh shuffle. The stream of examples depends on the seed
  alone: n hosts take every n-th of it, so that together they see the batches
  that one host would. The iterator's state is a checkpoint: restoring it
  continues with the next batch.

  Args:
    source: Anything with `__len__`; handed to `load`.
    load: Returns one example, `load(source, index, rng)`, as a dict of arrays
      of fixed shapes. `rng` depends on (seed, place in the stream) alone.
    batch: Examples per step over all hosts.
    seed: Of the order and of `rng`, in [0, 2**32).
    shard: (index, count) of this host; by default what the mesh says.

  Raises:
    UserError: where the source is empty, or hosts cannot share a batch.
  """
  index, count = shard or sharding.host_share()
  if not len(source):
    raise UserError(
        "Expected one or more, got a source without images. Check its path "
        "and split."
    )
  check(
      batch >= 1 and batch % count == 0, "batch", batch,
      f"a multiple of the {count} processes",
  )
  check(0 <= seed < 2**32, "seed", seed, "in [0, 2**32)")
  check(0 <= index < count, "shard", (index, count), "an index below its count")
  examples = (
      grain.MapDataset.range(len(source))
      .seed(seed)
      .shuffle()
      .repeat()
      .random_map(lambda item, rng: load(source, int(item), rng))
  )
  # Sliced last: the hosts' random numbers differ as their examples do.
  share = examples[index::count].to_iter_dataset(
      grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)
  )
  return share.batch(batch // count, drop_remainder=True)
