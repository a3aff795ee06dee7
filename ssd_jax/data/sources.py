"""Random-access sources of captioned pictures.

A source has `__len__` and `__getitem__`, which returns
`{"image": uint8 [H, W, 3], "caption": str, "tags": tuple[str, ...]}`; that is
all that grain asks for. Sources are picklable and open their files lazily, so
that grain's worker processes can hold them.
"""

import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import zipfile

import numpy as np
from PIL import Image

EMOJI_DIR = pathlib.Path(__file__).parent.parent / "assets" / "emoji_data"
VALIDATION_SHARE = 0.1  # of the groups


@dataclasses.dataclass(frozen=True)
class Emoji:
  """What is known of one vendored emoji picture.

  Attributes:
    code: Code points, joined by dashes; the picture's name.
    label: Name, such as "waving hand: dark skin tone".
    tags: Words that describe it.
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
    """Whether the picture carries no skin tone."""
    return self.code == self.base

  @property
  def is_validation(self) -> bool:
    """Whether the group was held out from all training."""
    digest = hashlib.sha256(self.group.encode()).digest()
    return int.from_bytes(digest[:4], "big") < VALIDATION_SHARE * 2**32


@functools.cache
def emoji_records(split: str = "all", tones: bool = True) -> tuple[Emoji, ...]:
  """The vendored emoji of a split ("train", "validation" or "all")."""
  rows = json.loads((EMOJI_DIR / "captions.json").read_text("utf-8"))
  emoji = (Emoji(**{**row, "tags": tuple(row["tags"])}) for row in rows)
  return tuple(
      e
      for e in emoji
      if (tones or e.is_base)
      and (split == "all" or e.is_validation == (split == "validation"))
  )


class EmojiSource:
  """The vendored Fluent emoji, one item per base emoji or per picture.

  With `tones`, item i is base emoji i in one of its skin tones, chosen by the
  caller through `variant`, so that the many tone variants weigh no more than
  other emoji.
  """

  def __init__(self, split: str):
    self.records = emoji_records(split, tones=False)
    variants: dict[str, list[Emoji]] = {}
    for emoji in emoji_records(split):
      variants.setdefault(emoji.base, []).append(emoji)
    self._variants = variants
    self._archive = None

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict:
    return self.load(self.records[index])

  def variant(self, index: int, rng: np.random.Generator) -> dict:
    """Item `index` in a random skin tone (half of the time in none)."""
    variants = self._variants[self.records[index].base]
    if len(variants) == 1 or rng.random() < 0.5:
      return self[index]
    return self.load(variants[rng.integers(len(variants))])

  def load(self, emoji: Emoji) -> dict:
    """The picture of one emoji with its caption."""
    if self._archive is None:
      self._archive = zipfile.ZipFile(EMOJI_DIR / "images.zip")
    blob = self._archive.read(f"{emoji.code}.webp")
    image = np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))
    return {"image": image, "caption": emoji.label, "tags": emoji.tags}

  def __getstate__(self) -> dict:
    return {**self.__dict__, "_archive": None}
