"""Sequences of images: arrays, or images that are read on access."""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

T = TypeVar("T")


class Images(Protocol):
  """N images, uint8 [H, W, 3] each, whose slices are arrays [n, H, W, 3]."""

  def __len__(self) -> int:
    """Returns the number of images N."""

  def __iter__(self) -> Iterator[np.ndarray]:
    """Iterates over the images."""

  def __getitem__(self, index: int | slice, /) -> np.ndarray:
    """Returns an image, or several images as an array."""


class OnDemand(Generic[T]):
  """Images that are read from their sources on each access.

  Attributes:
    sources: Source of each image, e.g. its path.
    read: Function from a source to an image, uint8 [H, W, 3].
  """

  def __init__(self, sources: Sequence[T], read: Callable[[T], np.ndarray]):
    self.sources, self.read = sources, read

  def __len__(self) -> int:
    return len(self.sources)

  def __iter__(self) -> Iterator[np.ndarray]:
    return map(self.read, self.sources)

  def __getitem__(self, index: int | slice, /) -> np.ndarray:
    if isinstance(index, slice):
      return np.stack([self.read(source) for source in self.sources[index]])
    return self.read(self.sources[index])
