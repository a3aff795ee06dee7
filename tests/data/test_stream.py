"""Batches of training: deterministic, sharded over hosts, resumed exactly."""

import json

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.data import sources, stream as data_stream
from tests.support.made_pictures import captioned_folder, truncate


def load_number(source, index, rng):
  """An item and a random number of its own."""
  return {"item": np.int64(source[index]),
          "draw": rng.integers(2**31, dtype=np.int64)}


def take(iterator, count):
  """The next batches, stacked: {name: [count, batch]}."""
  batches = [next(iterator) for _ in range(count)]
  return {k: np.stack([b[k] for b in batches]) for k in batches[0]}


def numbers(batch, seed=0, shard=None, size=10):
  """An iterator over the numbers below `size`."""
  return iter(
      data_stream.stream(range(size), load_number, batch, seed, shard))


def test_stream_is_deterministic():
  """The same seed gives the same batches, another seed others."""
  a, b, c = (take(numbers(4, seed), 8) for seed in (0, 0, 1))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
    assert (a[name] != c[name]).any()


def test_epochs_are_shuffled_and_whole():
  """Each epoch holds every item once, in an order of its own."""
  epochs = take(numbers(5), 6)["item"].reshape(3, 10)
  assert all(sorted(e) == list(range(10)) for e in epochs)
  assert len({tuple(e) for e in epochs}) == 3
  draws = take(numbers(5), 6)["draw"]
  assert len(np.unique(draws)) == draws.size


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_the_batches(count):
  """Hosts hold disjoint shares of the batches that one host would see."""
  whole = take(numbers(8), 5)
  shares = [take(numbers(8, shard=(i, count)), 5) for i in range(count)]
  for name in whole:
    for i, share in enumerate(shares):
      np.testing.assert_array_equal(share[name], whole[name][:, i::count])


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_restore_is_exact(steps):
  """A restored iterator goes on with the very next batch, mid-epoch too."""
  iterator = numbers(4)
  for _ in range(steps):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 6)
  fresh, used = numbers(4), numbers(4)
  take(used, 9)  # its threads have read ahead
  for other in (fresh, used):
    other.set_state(state)
    restored = take(other, 6)
    for name in expected:
      np.testing.assert_array_equal(restored[name], expected[name])


@pytest.mark.parametrize("arguments, match", [
    (dict(batch=6, shard=(0, 4)), "4 processes, got batch=6"),
    (dict(batch=0), "batch=0"),
    (dict(batch=4, size=0), "without images"),
    (dict(batch=4, seed=-1), "seed=-1"),
    (dict(batch=4, shard=(2, 2)), "shard"),
])
def test_stream_errors(arguments, match):
  """Settings that cannot be are one line."""
  with pytest.raises(UserError, match=match):
    numbers(**arguments)


def test_stream_over_pictures(tmp_path):
  """A folder streams as batches; a corrupt file in it is named."""
  folder = captioned_folder(tmp_path)

  def load(source, index, rng):
    return {"image": source.variant(index, rng)["image"]}

  source = sources.open_source(f"folder:{folder}", "all", 8)
  batch = next(iter(data_stream.stream(source, load, 6, 0)))
  assert batch["image"].shape == (6, 8, 8, 3)
  truncate(folder / "02.png")
  with pytest.raises(UserError, match="02.png"):
    next(iter(data_stream.stream(source, load, 6, 0)))
