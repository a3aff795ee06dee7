"""One reading of all images before training: captions, digests, damage.

Images are read in threads and dropped again, so that memory does not grow with
their number.
"""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib

import numpy as np

from ssd_jax.data.pictures import Source, Unreadable
from ssd_jax.data.stream import in_order


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
  """What a source holds, but for the pixels.

  Attributes:
    source: The source.
    captions: Label of each image.
    tags: Tags of each image.
    items: Indices of each item's images; the first is the plain variant.
    images: Digest of each item's images, uint64 [items].
  """

  source: Source
  captions: tuple[str, ...]
  tags: tuple[tuple[str, ...], ...]
  items: tuple[tuple[int, ...], ...]
  images: np.ndarray

  def texts(self) -> list[str]:
    """Returns all labels and tags."""
    return [*self.captions, *(tag for tags in self.tags for tag in tags)]

  def digests(self) -> np.ndarray:
    """Returns a digest of each item's labels and tags, uint64 [items]."""
    return np.array([
        digest(repr([(self.captions[i], self.tags[i]) for i in item]))
        for item in self.items], np.uint64)


def survey_all(
    splits: Mapping[str, Source],
    on_item: Callable[[int], object] = lambda count: None,
) -> dict[str, Survey]:
  """Reads every image of every split once.

  Args:
    splits: Sources by name.
    on_item: Called with 1 for every item.

  Raises:
    Unreadable: if images are damaged; the message names all of them.
  """
  found: dict[str, Survey] = {}
  damaged: dict[str, str] = {}
  for name, source in splits.items():
    try:
      found[name] = survey(source, on_item)
    except Unreadable as error:
      damaged |= error.reasons
  if damaged:
    raise Unreadable(damaged)
  return found


def survey(
    source: Source, on_item: Callable[[int], object] = lambda count: None
) -> Survey:
  """Reads every image of one source once; see `survey_all`."""
  captions: list[str] = []
  tags: list[tuple[str, ...]] = []
  items: list[tuple[int, ...]] = []
  images: list[int] = []
  damaged: dict[str, str] = {}
  for found in in_order(source, _read):
    on_item(1)
    if isinstance(found, Unreadable):
      damaged |= found.reasons
      continue
    image, texts = found
    items.append(tuple(range(len(captions), len(captions) + len(texts))))
    captions += [caption for caption, _ in texts]
    tags += [of_caption for _, of_caption in texts]
    images.append(image)
  if damaged:
    raise Unreadable(damaged)
  return Survey(source, tuple(captions), tuple(tags), tuple(items),
                np.array(images, np.uint64))


def _read(source: Source, index: int):
  """Returns (digest, (caption, tags) of each variant) of an item."""
  try:
    pictures = source.variants(index)
  except Unreadable as error:
    return error
  return (
      digest(*(np.ascontiguousarray(p["image"]) for p in pictures)),
      [(p["caption"], tuple(p["tags"])) for p in pictures])


def digest(*parts: str | np.ndarray) -> int:
  """Returns a number of 64 bits that depends on texts or arrays alone."""
  made = hashlib.blake2b(digest_size=8)
  for part in parts:
    made.update(part.encode("utf-8", "surrogateescape")
                if isinstance(part, str) else part.data)
  return int.from_bytes(made.digest(), "big")
