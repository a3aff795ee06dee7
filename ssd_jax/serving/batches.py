"""What a server computes, the same on each of its hosts.

JAX asks that all hosts of a job run the same programs in the same order. So the
first host, which answers the clients and decides, sends each call of this
module's methods to the others, which repeat it. A server of one host has nobody
to tell.
"""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import functools
import logging
import pickle
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding.sampling import Overrides
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.pipeline.run import Run
from ssd_jax.pipeline.slots import Finished, Item, Slots
from ssd_jax.runtime import sharding

_SIZE = 4096  # bytes of the first part of a message
_FAILED = "failed"  # sent instead of a method: the call before failed

P = ParamSpec("P")
T = TypeVar("T")
Self = TypeVar("Self", bound="Batches")


class LaneKey(NamedTuple):
  """What images of a batch must have in common.

  Attributes:
    decoder: Settings of the decoder.
    guided: Whether two guidance streams run.
    filtered: Whether top-k and top-p are applied, with numbers of each image.
    rows: Rows that are given.
  """

  decoder: Decoder
  guided: bool
  filtered: bool
  rows: int = 0


def _everywhere(
    method: Callable[Concatenate[Self, P], T]
) -> Callable[Concatenate[Self, P], T]:
  """Makes a method one that the other hosts repeat."""

  @functools.wraps(method)
  def call(self: Self, *args: P.args, **kwargs: P.kwargs) -> T:
    if self._order is None:
      with sharding.use_mesh(self._mesh):
        return method(self, *args, **kwargs)
    return self._order.submit(self._lead, method, args, kwargs).result()

  return call


class Batches:
  """The batches of each lane, one for few images and one for many.

  Calls may come from any thread; those of a server of several hosts take turns.

  Args:
    pipe: The model.
    most: Slots of the larger batch.
  """

  def __init__(self, pipe: Pipeline, most: int):
    self._pipe, self._sizes = pipe, sorted({1, most})
    self._lanes: dict[LaneKey, list[Slots]] = {}
    self._mesh = sharding.current()  # which each thread has to set
    self._order = (
        concurrent.futures.ThreadPoolExecutor(1, "hosts")
        if jax.process_count() > 1 and not jax.process_index() else None)

  def of(self, key: LaneKey) -> list[Slots]:
    """Returns the batches of a lane, to be read; none of one that is closed."""
    return self._lanes.get(key, [])

  @_everywhere
  def open(self, key: LaneKey, item: Item) -> None:
    """Compiles what a lane runs, by beginning an image in each batch.

    Args:
      key: The lane.
      item: Any image of it.
    """
    for slots in self._made(key):
      slots.insert(0, item)
      slots.start(1)
      if not slots.finish():
        slots.evict(0)
    grid = self._pipe.model.grid
    self._pipe.decode_images(np.zeros((1, grid.rows, grid.cols), np.int32))
    self._lanes[key] = self._made(key)

  @_everywhere
  def clear(self, key: LaneKey) -> None:
    """Forgets the images of a lane; programs are kept."""
    self._lanes[key] = self._made(key)

  @_everywhere
  def close(self, key: LaneKey) -> None:
    """Forgets a lane, and the programs of its decoder if no other needs it."""
    del self._lanes[key]
    if all(other.decoder != key.decoder for other in self._lanes):
      self._pipe.programs.forget(key.decoder)

  @_everywhere
  def insert(self, key: LaneKey, batch: int, slot: int, item: Item) -> None:
    """Prefills an image into a free slot; see `Slots`."""
    self._lanes[key][batch].insert(slot, item)

  @_everywhere
  def evict(self, key: LaneKey, batch: int, slot: int) -> None:
    """Frees the slot of an image that is not wanted any more."""
    self._lanes[key][batch].evict(slot)

  @_everywhere
  def advance(self, key: LaneKey, batch: int, most: int) -> list[Finished]:
    """Runs passes until an image finishes, and returns those that did.

    Args:
      key: The lane.
      batch: Number of its batch, which holds an image.
      most: Largest number of passes.
    """
    slots = self._lanes[key][batch]
    slots.start(most)
    finished = slots.finish()
    if jax.process_count() == 1:
      return finished  # pixels may be fetched later
    return [dataclasses.replace(x, pixels=sharding.fetch(x.pixels))
            for x in finished]

  @_everywhere
  def decode_image(self, tokens_RC: np.ndarray) -> np.ndarray:
    """Returns the image of a grid, uint8 [H, W, 3]."""
    return self._pipe.decode_images(tokens_RC[None], 1)[0]

  @_everywhere
  def encode_images(self, images: np.ndarray) -> np.ndarray:
    """Returns the token grids of images; see `Pipeline.encode_images`."""
    return self._pipe.encode_images(images)

  @_everywhere
  def check(self, decoder: Decoder, prompt: str, sampling: Overrides) -> None:
    """Raises UserError if the model cannot run a decoder."""
    self._pipe.num_queries(decoder, [prompt], **sampling)

  @_everywhere
  def idle(self) -> None:
    """Does nothing, so that the other hosts do not wait for too long."""

  def end(self) -> None:
    """Lets the other hosts end; nothing may be called any more."""
    if self._order is not None:
      self._order.submit(_send, None).result()
      self._order.shutdown(cancel_futures=True)

  def follow(self) -> None:
    """Repeats what the first host does, until it ends.

    Raises:
      RuntimeError: if a call failed here and not on the first host: the hosts
        hold different images from then on, and would wait for each other.
    """
    error: Exception | None = None
    while (call := _receive()) is not None:
      name, args, kwargs = call
      if error is not None and name != _FAILED:
        raise RuntimeError(
            "Expected what the first host can do, got an error.") from error
      error = None
      if name == _FAILED:
        continue  # the first host now forgets what the call would have changed
      try:
        getattr(self, name)(*args, **kwargs)
      except UserError:
        pass  # which the first host says
      except Exception as raised:
        logging.exception("%s failed", name)
        error = raised

  def _lead(self, method: Any, args: Any, kwargs: Any) -> Any:
    with sharding.use_mesh(self._mesh):
      _send((method.__name__, args, kwargs))
      try:
        return method(self, *args, **kwargs)
      except UserError:
        raise
      except Exception:
        _send((_FAILED, (), {}))
        raise

  def _made(self, key: LaneKey) -> list[Slots]:
    programs = self._pipe.programs
    return [Slots(Run(programs, key.decoder, key.rows), size)
            for size in self._sizes]


def _send(value: Any) -> None:
  """Sends a value to the other hosts, in one part or two."""
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  first = np.zeros(_SIZE + 4, np.uint8)
  first[:4] = np.frombuffer(np.uint32(len(data)).tobytes(), np.uint8)
  first[4:4 + min(len(data), _SIZE)] = data[:_SIZE]
  sharding.broadcast_from_host0(first)
  if len(data) > _SIZE:
    sharding.broadcast_from_host0(_padded(data[_SIZE:]))


def _receive() -> Any:
  """Returns the value that the first host sends next."""
  first = sharding.broadcast_from_host0(np.zeros(_SIZE + 4, np.uint8))
  size = int(np.frombuffer(first[:4].tobytes(), np.uint32)[0])
  data = first[4:4 + size]
  if size > _SIZE:
    rest = sharding.broadcast_from_host0(
        _padded(np.zeros(size - _SIZE, np.uint8)))
    data = np.concatenate([data, rest])[:size]
  return pickle.loads(data.tobytes())


def _padded(data: np.ndarray) -> np.ndarray:
  """Returns bytes padded to a power of two: few shapes are compiled."""
  return np.pad(data, (0, (1 << (len(data) - 1).bit_length()) - len(data)))
