"""Shuffled, endless, resumable and deterministic streams of batches."""

from collections.abc import Callable, Iterator
import os
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
  """Returns an endless stream of this host's share of the batches.

  Every epoch is shuffled anew. The stream of examples depends on the seed
  alone: each of n hosts takes every n-th example, so that together they see the
  batches that one host would see. The iterator's state is a checkpoint; a
  restored iterator continues with the next batch.

  Args:
    source: Anything with `__len__`; passed to `load`.
    load: Returns one example, `load(source, index, rng)`, as a dict of arrays
      of fixed shapes. `rng` depends on the seed and the position in the stream
      alone.
    batch: Examples per step over all hosts.
    seed: Seed of the order and of `rng`, in [0, 2**32).
    shard: (index, count) of this host; the mesh decides by default.

  Raises:
    UserError: if the source is empty or hosts cannot share a batch.
  """
  index, count = shard or sharding.host_share()
  if not len(source):
    raise UserError(
        "Expected one or more images, got a source without images. Check its "
        "path and split."
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
  # Sliced last, so that random numbers belong to examples, not to hosts.
  share = examples[index::count].to_iter_dataset(
      grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)
  )
  return share.batch(batch // count, drop_remainder=True)


def in_order(source: Any, read: Callable[[Any, int], Any]) -> Iterator[Any]:
  """Yields `read(source, index)` of every item, some of them read ahead.

  Args:
    source: Anything with `__len__`; passed to `read`.
    read: Called in threads; returns anything but None.
  """
  threads = min(16, os.cpu_count() or 1)
  yield from grain.MapDataset.range(len(source)).map(
      lambda index: read(source, int(index))).to_iter_dataset(
          grain.ReadOptions(
              num_threads=threads, prefetch_buffer_size=2 * threads))
