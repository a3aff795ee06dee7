"""Streams of batches by grain: shuffled, endless, resumable, deterministic."""

from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np


def stream(
    source: Any,
    load: Callable[[Any, int, np.random.Generator], dict],
    batch: int,
    seed: int,
) -> grain.IterDataset:
  """An endless stream of batches of `load(source, index, rng)`.

  Every epoch is a fresh shuffle; each host reads its own share of it. The
  iterator's state is a checkpoint: restoring it continues with the next batch.

  Args:
    source: Anything with `__len__`; handed to `load`.
    load: Returns one example as a dict of arrays of fixed shapes. `rng` depends
      on (seed, position in the stream) alone.
    batch: Examples per step over all hosts.
    seed: Of the order and of `rng`.
  """
  shard = slice(jax.process_index(), None, jax.process_count())
  dataset = (
      grain.MapDataset.range(len(source))
      .seed(seed)
      .shuffle()
      .repeat()
      [shard]
      .random_map(lambda index, rng: load(source, int(index), rng))
      .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32))
  )
  return dataset.batch(batch // jax.process_count(), drop_remainder=True)
