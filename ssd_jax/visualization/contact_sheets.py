"""Layout of images and captions, and writing of images."""

from collections.abc import Sequence
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ssd_jax.storage.files import replacing

_GAP = 6
_TEXT = 12  # font size in pixels
_LINE = 16  # height of a line in pixels
_LEAST = 64  # least width of a caption in pixels


def contact_sheet(
    images: Sequence[Sequence[np.ndarray]], rows: Sequence[str],
    columns: Sequence[str], most: int = 192,
) -> Image.Image:
  """Returns a table of images with a caption for each row and column.

  Args:
    images: images[row][column], uint8 [H, W, 3], all of one size.
    rows: Captions of the rows.
    columns: Captions of the columns.
    most: Largest longer side of an image in pixels; larger images are shrunk.
  """
  height, width = images[0][0].shape[:2]
  scale = min(1.0, most / max(height, width))
  size = (max(int(width * scale), 1), max(int(height * scale), 1))
  side = 120
  head = [text_box("", side, 2)] + [
      text_box(text, max(size[0], _LEAST), 2) for text in columns]
  lines = [abreast(head)]
  for caption, row in zip(rows, images, strict=True):
    boxes = [padded(Image.fromarray(x).resize(size, Image.Resampling.LANCZOS),
                    max(size[0], _LEAST)) for x in row]
    fit = max(size[1] // _LINE, 1)
    lines.append(abreast([text_box(caption, side, fit)] + boxes))
  return padded(stack(lines, _GAP), lines[0].width + 2 * _GAP)


def captioned(
    images: Sequence[np.ndarray], captions: Sequence[str],
) -> Image.Image:
  """Returns images above their captions, in rows of at most eight.

  Args:
    images: uint8 [H, W, 3] each, all of one size.
    captions: One caption per image.
  """
  columns = min(8, math.ceil(math.sqrt(len(images))))
  boxes = [
      stack([Image.fromarray(image),
             text_box(text, max(image.shape[1], _LEAST), 2)])
      for image, text in zip(images, captions, strict=True)]
  rows = [abreast(boxes[i:i + columns]) for i in range(0, len(boxes), columns)]
  sheet = stack(rows, _GAP)
  return padded(sheet, sheet.width + 2 * _GAP)


def text_box(text: str, width: int, lines: int) -> Image.Image:
  """Returns text wrapped into a box, cut with an ellipsis if too long."""
  font = ImageFont.load_default(_TEXT)
  fitted: list[str] = []
  words = text.replace("+", " +").split()
  while words and len(fitted) < lines:
    line = words.pop(0)
    while words and font.getlength(f"{line} {words[0]}") <= width:
      line += f" {words.pop(0)}"
    fitted.append(line)
  if words:
    fitted[-1] += " ..."
  fitted = [_cut(line, width, font) for line in fitted]
  box = Image.new("RGB", (width, _LINE * max(len(fitted), 1)), "white")
  draw = ImageDraw.Draw(box)
  for number, line in enumerate(fitted):
    draw.text((0, number * _LINE), line, "black", font)
  return box


def _cut(line: str, width: int, font: Any) -> str:
  """Returns a line, cut with an ellipsis if it does not fit."""
  if font.getlength(line) <= width:
    return line
  while line and font.getlength(f"{line}...") > width:
    line = line[:-1]
  return f"{line}..."


def caption(width: int, words: Sequence[str]) -> Image.Image:
  """Returns a line with the first text on the left and the others on the right.

  Args:
    width: Width in pixels.
    words: Texts of the line.
  """
  font = ImageFont.load_default(_TEXT)
  right = "  ".join(words[1:])
  room = width - int(font.getlength(right)) - 4
  line = Image.new("RGB", (width, _LINE), "white")
  if room > 16:
    line.paste(text_box(words[0], room, 1), (0, 0))
  ImageDraw.Draw(line).text(
      (width - font.getlength(right), 0), right, "black", font)
  return line


def stack(parts: Sequence[Image.Image], gap: int = 0) -> Image.Image:
  """Returns images stacked vertically."""
  size = (max(p.width for p in parts), sum(p.height + gap for p in parts))
  canvas, top = Image.new("RGB", size, "white"), 0
  for part in parts:
    canvas.paste(part, (0, top))
    top += part.height + gap
  return canvas


def abreast(parts: Sequence[Image.Image]) -> Image.Image:
  """Returns images side by side."""
  width = sum(p.width for p in parts) + _GAP * (len(parts) - 1)
  canvas = Image.new("RGB", (width, max(p.height for p in parts)), "white")
  left = 0
  for part in parts:
    canvas.paste(part, (left, 0))
    left += part.width + _GAP
  return canvas


def padded(part: Image.Image, width: int) -> Image.Image:
  """Returns an image centred on a white strip of the given width."""
  canvas = Image.new("RGB", (width, part.height), "white")
  canvas.paste(part, ((width - part.width) // 2, 0))
  return canvas


def save_picture(
    image: Image.Image, path: pathlib.Path, kind: str = "png", **kwargs: Any
) -> None:
  """Writes an image atomically.

  Raises:
    UserError: if the disk is full or the folder is not writable.
  """
  with replacing(path) as partial:
    image.save(partial, kind, **kwargs)
