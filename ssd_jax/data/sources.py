"""The vendored emoji, and a lookup of sources by name.

`open_source` turns "emoji", "folder:PATH" or "tfds:NAME" into a source of
captioned images with a fixed split into training and validation.
"""

from collections.abc import Sequence
import dataclasses
import functools
import io
import json
import pathlib
from urllib import parse
import zipfile

import numpy as np
from PIL import Image

from ssd_jax.core.config import UserError, check
from ssd_jax.data.folder import FolderSource
from ssd_jax.data.pictures import (
  VALIDATION_SHARE,
  Source,
  hash_fraction,
  to_square,
)
from ssd_jax.data.tfds import TFDSSource

EMOJI_DIR = pathlib.Path(__file__).parent.parent / "assets" / "emoji_data"
EMOJI_PIXELS = 128
SPLITS = ("train", "validation", "all")
_TFDS_OPTIONS = ("split", "image_key", "caption_key", "data_dir")


@dataclasses.dataclass(frozen=True)
class Emoji:
  """Metadata of one vendored emoji image.

  Attributes:
    code: Code points joined by dashes; the image's name.
    label: Name, such as "waving hand: dark skin tone".
    tags: Words that describe the emoji.
    base: Code of the same emoji without skin tone.
    group: Code without skin tone and gender; the unit of the split.
  """

  code: str
  label: str
  tags: tuple[str, ...]
  base: str
  group: str

  @property
  def is_base(self) -> bool:
    """Whether the image carries no skin tone."""
    return self.code == self.base

  @property
  def is_validation(self) -> bool:
    """Whether the group is held out from all training."""
    return hash_fraction(self.group) < VALIDATION_SHARE


@functools.cache
def emoji_records(split: str = "all", tones: bool = True) -> tuple[Emoji, ...]:
  """Returns the vendored emoji of a split.

  Args:
    split: "train", "validation" or "all".
    tones: Whether emoji with skin tones are included.
  """
  check(split in SPLITS, "split", split, f"one of {SPLITS}")
  rows = json.loads((EMOJI_DIR / "captions.json").read_text("utf-8"))
  emoji = (Emoji(**{**row, "tags": tuple(row["tags"])}) for row in rows)
  return tuple(
      e
      for e in emoji
      if (tones or e.is_base)
      and (split == "all" or e.is_validation == (split == "validation"))
  )


@functools.cache
def _emoji_files() -> dict[str, bytes]:
  """Returns the vendored files, 8 MB, so that threads share no file handle."""
  with zipfile.ZipFile(EMOJI_DIR / "images.zip") as archive:
    return {name: archive.read(name) for name in archive.namelist()}


class EmojiSource(Source):
  """The vendored Fluent emoji, one item per base emoji.

  Images in other skin tones are variants of an item, so that emoji with many
  skin tones do not outweigh the others.
  """

  def __init__(self, split: str, pixels: int = EMOJI_PIXELS):
    self.pixels = pixels
    self.records = emoji_records(split, tones=False)
    self.keys = tuple(emoji.code for emoji in self.records)
    self._variants = {emoji.base: [emoji] for emoji in self.records}
    for emoji in emoji_records(split):
      if not emoji.is_base:
        self._variants[emoji.base].append(emoji)

  def __getitem__(self, index: int) -> dict:
    return self.load(self.records[index])

  def caption(self, index: int) -> str:
    """Returns the name of the emoji without reading its image."""
    return self.records[index].label

  def variants(self, index: int) -> list[dict]:
    """Returns item `index` without skin tone, then in every skin tone."""
    base = self.records[index].base
    return [self.load(emoji) for emoji in self._variants[base]]

  def variant(self, index: int, rng: np.random.Generator) -> dict:
    """Returns item `index` in a random skin tone, half of the time in none."""
    variants = self._variants[self.records[index].base]
    if len(variants) == 1 or rng.random() < 0.5:
      return self[index]
    return self.load(variants[rng.integers(len(variants))])

  def load(self, emoji: Emoji) -> dict:
    """Returns the image of one emoji with its caption."""
    blob = _emoji_files()[f"{emoji.code}.webp"]
    image = to_square(Image.open(io.BytesIO(blob)), self.pixels)
    return {"image": image, "caption": emoji.label, "tags": emoji.tags}


class Subset(Source):
  """Some items of a source."""

  def __init__(self, source: Source, indices: Sequence[int]):
    self.source = source
    self.indices = tuple(indices)
    self.keys = tuple(source.keys[i] for i in self.indices)
    self.notes = source.notes

  def __getitem__(self, index: int) -> dict:
    return self.source[self.indices[index]]

  def caption(self, index: int) -> str:
    """Returns the caption of the source."""
    return self.source.caption(self.indices[index])

  def variants(self, index: int) -> list[dict]:
    """Returns the variants of the source."""
    return self.source.variants(self.indices[index])

  def variant(self, index: int, rng: np.random.Generator) -> dict:
    """Returns a random variant of the source."""
    return self.source.variant(self.indices[index], rng)


def hold_out(source: Source, split: str) -> Source:
  """Returns the items of a split; an item's split depends on its key alone.

  An item keeps its split when others are added. If a split would be empty, only
  the item with the smallest hash is held out.

  Raises:
    UserError: if the source has a single key, which cannot be split.
  """
  check(split in SPLITS, "split", split, f"one of {SPLITS}")
  if split == "all":
    return source
  places = np.array([hash_fraction(key) for key in source.keys])
  is_held = places < VALIDATION_SHARE
  if is_held.all() or not is_held.any():
    is_held = places == places.min()
  chosen = np.flatnonzero(is_held == (split == "validation"))
  if not len(chosen):
    raise UserError(
        "Expected two or more images, of which one is held out, got "
        f"{len(source)} image(s) of one name. Add images."
    )
  return Subset(source, chosen.tolist())


def open_source(spec: str, split: str, pixels: int) -> Source:
  """Returns one split of what `open_splits` opens."""
  return open_splits(spec, (split,), pixels)[split]


def open_splits(
    spec: str, splits: Sequence[str], pixels: int
) -> dict[str, Source]:
  """Returns the sources that `spec` names, with images of `pixels` by `pixels`.

  Args:
    spec: "emoji", "folder:PATH" or "tfds:NAME". Options of TFDS follow a
      question mark: "tfds:NAME?caption_key=label&split=train".
    splits: Any of "train", "validation" and "all". Emoji are split by group,
      other images by the hash of their file name or index.
    pixels: Side of the images.

  Raises:
    UserError: if the spec, an image or a caption is invalid.
  """
  check(pixels >= 1, "pixels", pixels, ">= 1")
  if spec == "emoji":
    return {split: EmojiSource(split, pixels) for split in splits}
  source = _open(spec, pixels)
  return {split: hold_out(source, split) for split in splits}


def _open(spec: str, pixels: int) -> Source:
  kind, _, rest = spec.partition(":")
  if kind == "folder" and rest:
    return FolderSource(rest, pixels)
  if kind == "tfds" and rest:
    name, _, query = rest.partition("?")
    query = query.replace("+", "%2B")  # TFDS joins splits with a plus
    options = {"split": "train", **dict(parse.parse_qsl(query))}
    for option in options:
      check(option in _TFDS_OPTIONS, "option", option, f"in {_TFDS_OPTIONS}")
    return TFDSSource(name, pixels=pixels, **options)
  raise UserError(
      f"Expected emoji, folder:PATH or tfds:NAME, got {spec!r}. Choose one of "
      "these."
  )
