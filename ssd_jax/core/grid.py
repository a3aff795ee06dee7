"""The image as a sequence of slots: grid positions and forced slots."""

import dataclasses
import functools

import numpy as np

from ssd_jax.core.config import check, check_sizes

FREE = -1
_MOST_TOKENS = 2**20


@dataclasses.dataclass(frozen=True)
class Grid:
  """A grid of `rows` x `cols` image tokens, with or without end-of-row tokens.

  Slots are numbered in raster order. With `end_of_row`, a forced slot, whose
  token is known before any pass, follows each row but the last: after the last
  row nothing is left to predict, so the sequence ends with its last image
  token.

  >>> Grid(2, 3, end_of_row=True).slot_of.tolist()
  [[0, 1, 2], [4, 5, 6]]

  Attributes:
    rows: Number of rows R.
    cols: Number of columns C.
    end_of_row: Whether a forced slot ends each row.
  """

  rows: int
  cols: int
  end_of_row: bool = False

  def __post_init__(self):
    check_sizes(self)
    check(self.rows * self.cols <= _MOST_TOKENS, "rows x cols",
          f"{self.rows} x {self.cols}", f"at most {_MOST_TOKENS} tokens")

  @property
  def row_slots(self) -> int:
    """Number of slots from the start of a row to the start of the next."""
    return self.cols + int(self.end_of_row)

  @property
  def length(self) -> int:
    """Number of slots N of the sequence."""
    return self.rows * self.row_slots - int(self.end_of_row)

  @property
  def num_tokens(self) -> int:
    """Number of image tokens, which is AR's number of passes."""
    return self.rows * self.cols

  @functools.cached_property
  def col_of(self) -> np.ndarray:
    """The column of each slot, int32 [N]; `cols` for end-of-row slots."""
    return (np.arange(self.length) % self.row_slots).astype(np.int32)

  @functools.cached_property
  def is_forced(self) -> np.ndarray:
    """Which slots have a token that is known before any pass, bool [N]."""
    return self.col_of >= self.cols

  @functools.cached_property
  def slot_of(self) -> np.ndarray:
    """The slot of each grid position, int32 [R, C]."""
    rows, cols = np.mgrid[: self.rows, : self.cols]
    return (rows * self.row_slots + cols).astype(np.int32)

  def forced_tokens(self, vocab: int) -> np.ndarray:
    """Returns the token of each forced slot, else FREE, int32 [N].

    Args:
      vocab: Number of image tokens V, which is also the end-of-row token.
    """
    return np.where(self.is_forced, vocab, FREE).astype(np.int32)
