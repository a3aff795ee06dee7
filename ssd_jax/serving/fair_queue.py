"""A queue that serves its clients in turn."""

import collections
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
  """First in, first out for a client; clients take turns.

  A client that asks for ten images delays another's one by one image.

  >>> queue = FairQueue()
  >>> for thing in ["a1", "a2", "b1"]:
  ...   queue.put(thing[0], thing)
  >>> [queue.take(lambda thing: True) for _ in range(3)]
  ['a1', 'b1', 'a2']
  """

  def __init__(self) -> None:
    self._waiting: collections.OrderedDict[Hashable, collections.deque[T]] = (
        collections.OrderedDict())

  def __len__(self) -> int:
    return sum(map(len, self._waiting.values()))

  def __iter__(self) -> Iterator[T]:
    """Iterates over all, one client after the other."""
    for things in self._waiting.values():
      yield from things

  def put(self, client: Hashable, thing: T) -> None:
    """Appends an item of a client."""
    self._waiting.setdefault(client, collections.deque()).append(thing)

  def take(self, is_wanted: Callable[[T], bool]) -> T | None:
    """Removes and returns the next wanted item; clients take turns."""
    for client, things in self._waiting.items():
      for thing in things:
        if is_wanted(thing):
          things.remove(thing)
          self._waiting.move_to_end(client)
          if not things:
            del self._waiting[client]
          return thing
    return None

  def drop(self, is_dropped: Callable[[T], bool]) -> list[T]:
    """Removes and returns all for which `is_dropped` holds."""
    dropped = [thing for thing in self if is_dropped(thing)]
    for client, things in list(self._waiting.items()):
      kept = collections.deque(x for x in things if not is_dropped(x))
      if kept:
        self._waiting[client] = kept
      else:
        del self._waiting[client]
    return dropped
