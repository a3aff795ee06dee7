"""Many pictures as one thing: an array, or read when they are asked for."""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

T = TypeVar("T")


class Images(Protocol):
  """N pictures, uint8 [H, W, 3] each, whose slices are arrays [n, H, W, 3]."""

  def __len__(self) -> int:
    """N."""

  def __iter__(self) -> Iterator[np.ndarray]:
    """Each picture."""

  def __getitem__(self, index: int | slice, /) -> np.ndarray:
    """A picture, or several as an array."""


class OnDemand(Generic[T]):
  """Pictures that are read from where they lie, each time anew.

  Attributes:
    places: Where each lies.
    read: A place -> uint8 [H, W, 3].
  """

  def __init__(self, places: Sequence[T], read: Callable[[T], np.ndarray]):
    self.places, self.read = places, read

  def __len__(self) -> int:
    return len(self.places)

  def __iter__(self) -> Iterator[np.ndarray]:
    return map(self.read, self.places)

  def __getitem__(self, index: int | slice, /) -> np.ndarray:
    if isinstance(index, slice):
      return np.stack([self.read(place) for place in self.places[index]])
    return self.read(self.places[index])
