"""Words of a caption -> ids, for families whose prompt is a prefix of tokens.

A word that the vocabulary lacks is spelled in UTF-8 bytes, so that any text in
any script has ids.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
import functools
import re
import unicodedata

import numpy as np

PAD, START, IMAGE = 0, 1, 2  # START opens the caption, IMAGE the picture
_BYTES = 3  # the first byte's id
_WORDS = _BYTES + 256
_SPLIT = re.compile(r"[^\W_]+|[^\w\s]|_")


def words_of(text: str) -> list[str]:
  """Lower-case words and punctuation marks of a text, in NFKC."""
  return _SPLIT.findall(unicodedata.normalize("NFKC", text).lower())


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A list of known words over a floor of bytes.

  Attributes:
    words: Known words; word i has id 259 + i.
    length: Prompt slots P. The last one always holds IMAGE.
  """

  words: tuple[str, ...]
  length: int

  @classmethod
  def build(
      cls, texts: Iterable[str], length: int, min_count: int = 1
  ) -> "Vocabulary":
    """The words that occur at least `min_count` times, most frequent first."""
    counts = Counter(word for text in texts for word in words_of(text))
    ranked = sorted(counts.items(), key=lambda x: (-x[1], x[0]))
    known = [word for word, count in ranked if count >= min_count]
    return cls(tuple(known), length)

  @property
  def size(self) -> int:
    """Ids in use, special ones and bytes included."""
    return _WORDS + len(self.words)

  @functools.cached_property
  def _index(self) -> dict[str, int]:
    return {word: _WORDS + i for i, word in enumerate(self.words)}

  def ids(self, word: str) -> list[int]:
    """The id of a known word, or its bytes."""
    known = self._index.get(word)
    return [known] if known is not None else self.spell(word)

  def spell(self, word: str) -> list[int]:
    """The ids of a word's bytes."""
    return [_BYTES + byte for byte in word.encode("utf-8")]

  def encode(self, text: str | None) -> tuple[list[int], bool]:
    """(ids of a caption, whether it was too long and cut); None has no ids."""
    ids = [i for word in words_of(text or "") for i in self.ids(word)]
    room = self.length - 2
    return ids[:room], len(ids) > room

  def pad(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [P], bool [P]): START, ids, padding, IMAGE in the last slot."""
    tokens = np.full(self.length, PAD, np.int32)
    tokens[0] = START
    tokens[1 : 1 + len(ids)] = ids
    tokens[-1] = IMAGE
    return tokens, tokens != PAD
