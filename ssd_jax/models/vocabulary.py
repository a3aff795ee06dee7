"""Word-level vocabulary of captions, for prompts that are a prefix of tokens.

Words outside the vocabulary are encoded as UTF-8 bytes, so any text in any
script has ids.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
import functools
import re
import unicodedata

import numpy as np

PAD, START, IMAGE = 0, 1, 2  # START begins the caption, IMAGE the image
_BYTES = 3  # id of the first byte
_WORDS = _BYTES + 256  # id of the first word
_SPLIT = re.compile(r"[^\W_]+|[^\w\s]|_")


def words_of(text: str) -> list[str]:
  """Returns the lower-case words and punctuation marks of a text, in NFKC."""
  return _SPLIT.findall(unicodedata.normalize("NFKC", text).lower())


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A list of known words with a byte fallback.

  Attributes:
    words: Known words; word i has id 259 + i.
    length: Number of prompt slots P. The last one always holds IMAGE.
  """

  words: tuple[str, ...]
  length: int

  @classmethod
  def build(
      cls, texts: Iterable[str], length: int, min_count: int = 1
  ) -> "Vocabulary":
    """Builds a vocabulary of words that occur at least `min_count` times.

    Args:
      texts: Captions.
      length: Number of prompt slots P.
      min_count: Fewest occurrences of a word.
    """
    counts = Counter(word for text in texts for word in words_of(text))
    ranked = sorted(counts.items(), key=lambda x: (-x[1], x[0]))
    known = [word for word, count in ranked if count >= min_count]
    return cls(tuple(known), length)

  @property
  def size(self) -> int:
    """Number of ids, special ones and bytes included."""
    return _WORDS + len(self.words)

  @functools.cached_property
  def _index(self) -> dict[str, int]:
    return {word: _WORDS + i for i, word in enumerate(self.words)}

  def ids(self, word: str) -> list[int]:
    """Returns the id of a known word, or the ids of a word's bytes."""
    known = self._index.get(word)
    return [known] if known is not None else self.spell(word)

  def spell(self, word: str) -> list[int]:
    """Returns the ids of a word's bytes."""
    return [_BYTES + byte for byte in word.encode("utf-8")]

  def encode(self, text: str | None) -> tuple[list[int], bool]:
    """Encodes a caption.

    Args:
      text: The caption; None has no ids.

    Returns:
      Its ids, and whether they were truncated.
    """
    ids = [i for word in words_of(text or "") for i in self.ids(word)]
    room = self.length - 2
    return ids[:room], len(ids) > room

  def pad(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pads ids to the prompt slots.

    Args:
      ids: Ids of a caption.

    Returns:
      START, ids, padding and IMAGE in the last slot, int32 [P]; and which of
      the slots are not padding, bool [P].
    """
    tokens = np.full(self.length, PAD, np.int32)
    tokens[0] = START
    tokens[1 : 1 + len(ids)] = ids
    tokens[-1] = IMAGE
    return tokens, tokens != PAD
