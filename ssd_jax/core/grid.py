"""The image as a sequence: which slot holds which cell, which are forced."""

import dataclasses
import functools

import numpy as np

FREE = -1


@dataclasses.dataclass(frozen=True)
class Grid:
  """A raster of `rows` x `cols` cells, with or without end-of-row tokens.

  Slots are numbered in raster order. With `end_of_row`, a slot whose token is
  known before any pass follows each row but the last; after the last row
  nothing is left to predict, so the sequence ends with its last cell.

  >>> Grid(2, 3, end_of_row=True).slot_of.tolist()
  [[0, 1, 2], [4, 5, 6]]

  Attributes:
    rows: Rows R.
    cols: Columns C.
    end_of_row: Whether a forced slot ends each row.
  """

  rows: int
  cols: int
  end_of_row: bool = False

  @property
  def row_slots(self) -> int:
    """Slots from the start of a row to the start of the next."""
    return self.cols + int(self.end_of_row)

  @property
  def length(self) -> int:
    """Slots N of the sequence."""
    return self.rows * self.row_slots - int(self.end_of_row)

  @property
  def num_tokens(self) -> int:
    """Cells of the image; AR's passes."""
    return self.rows * self.cols

  @functools.cached_property
  def row_of(self) -> np.ndarray:
    """int32 [N]: the row of each slot."""
    return (np.arange(self.length) // self.row_slots).astype(np.int32)

  @functools.cached_property
  def col_of(self) -> np.ndarray:
    """int32 [N]: the column of each slot; `cols` at an end-of-row slot."""
    return (np.arange(self.length) % self.row_slots).astype(np.int32)

  @functools.cached_property
  def is_forced(self) -> np.ndarray:
    """bool [N]: slots whose token is known before any pass."""
    return self.col_of >= self.cols

  @functools.cached_property
  def slot_of(self) -> np.ndarray:
    """int32 [R, C]: the slot of each cell."""
    rows, cols = np.mgrid[: self.rows, : self.cols]
    return (rows * self.row_slots + cols).astype(np.int32)

  def forced_tokens(self, vocab: int) -> np.ndarray:
    """int32 [N]: the forced token, V for end-of-row, or FREE."""
    return np.where(self.is_forced, vocab, FREE).astype(np.int32)
