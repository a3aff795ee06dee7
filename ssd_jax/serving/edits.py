"""Forms of the Images API's edits: an image, of which the upper rows are kept.

A raster model draws from top to bottom, so an edit is a completion: a mask may
leave out everything below some row, and nothing else.
"""

from collections.abc import Callable, Mapping
import io
import json
from typing import Any
import warnings

import numpy as np
from PIL import Image

from ssd_jax.core.config import UserError
from ssd_jax.core.extras import need
from ssd_jax.core.grid import Grid
from ssd_jax.data import pictures
from ssd_jax.serving.requests import ApiError
from ssd_jax.storage import image_files

MOST_BYTES = 16 * 2**20
_MOST_PIXELS = 2**25  # of a file, which may pack many in few bytes
_JSON = ("n", "seed", "guidance_scale", "temperature", "top_k", "top_p",
         "stream", "partial_images", "output_compression", "progress", "rows")
_FILES = ("image", "image[]", "mask")


async def read_form(request: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
  """Returns a form's fields, as JSON would hold them, and its files.

  Raises:
    ApiError: if it is no form, too long, or a field is twice there.
  """
  need("python_multipart", "serve")
  multipart = need("starlette.formparsers", "serve")
  kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
  if kind != "multipart/form-data":
    raise ApiError(415, "Expected Content-Type: multipart/form-data, got "
                        f"{kind[:40]!r}.")
  length = request.headers.get("content-length", "")
  if not length.isdigit():
    raise ApiError(411, "Expected a Content-Length, got none.")
  if int(length) > MOST_BYTES:
    raise ApiError(413, f"Expected a form of at most {MOST_BYTES} bytes, got "
                        f"{length}.")
  try:
    form = await multipart.MultiPartParser(
        request.headers, request.stream(), max_files=3, max_fields=40,
        max_part_size=65_536).parse()
  except (multipart.MultiPartException, KeyError, ValueError) as error:
    raise ApiError(400, f"Expected a form that can be read, got {error}.") \
        from error
  fields: dict[str, Any] = {}
  files: dict[str, bytes] = {}
  for name, value in form.multi_items():
    if name in fields or name in files:
      raise ApiError(400, f"Expected one {name[:40]}, got several.", param=name)
    if isinstance(value, str):
      fields[name] = _value(name, value)
    else:
      files[name] = await value.read()
  for name in [*fields, *files]:
    if (name in _FILES) != (name in files):
      raise ApiError(400, f"Expected {name[:40]} as "
                          f"{'a file' if name in _FILES else 'text'}, got "
                          "another part.", param=name)
  return fields, files


def _value(name: str, text: str) -> Any:
  """Returns a field's value: numbers and truth values are spelt as in JSON."""
  if name in _JSON:
    try:
      return json.loads(text.lower())
    except (ValueError, RecursionError):
      return text  # `parse` says what is expected
  return text


def kept_rows(
    fields: Mapping[str, Any], files: Mapping[str, bytes], grid: Grid,
    image_shape: tuple[int, ...], encode: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
  """Returns the tokens that are kept, int32 [rows, C].

  They are those above the mask; without one `rows` of them, or half.

  Args:
    fields: Fields of the form.
    files: Files of the form.
    grid: The image as a sequence.
    image_shape: (height, width, 3) of the model's images.
    encode: Function from images to token grids.

  Raises:
    ApiError: if there is no image, or nothing is left to keep or to draw.
  """
  image = files.get("image", files.get("image[]"))
  if image is None:
    raise ApiError(400, "Expected an image, got none.", param="image")
  height, width = image_shape[:2]
  _check_size(image, "image")
  try:
    pixels = pictures.read(io.BytesIO(image), "the file", width, height)
  except UserError as error:
    raise ApiError(400, str(error), param="image") from error
  rows, name = fields.get("rows"), "rows"
  if "mask" in files:
    rows, name = _rows_above(files["mask"], grid), "mask"
  elif rows is None:
    rows = grid.rows // 2
  is_whole = isinstance(rows, int) and not isinstance(rows, bool)
  if not is_whole or not 0 < rows < grid.rows:
    raise ApiError(
        400, f"Expected to keep 1 to {grid.rows - 1} rows of tokens, got "
        f"{str(rows)[:40]} by {name}.", param=name)
  try:
    return encode(pixels[None])[0, :rows]
  except UserError as error:
    raise ApiError(501, str(error), code="unsupported") from error


def _check_size(file: bytes, param: str) -> None:
  """Raises ApiError if an image has more pixels than memory is spent on."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      width, height = Image.open(io.BytesIO(file)).size
  except image_files.FAILURES:
    return  # its reader says what is wrong
  if width * height > _MOST_PIXELS:
    raise ApiError(400, f"Expected at most {_MOST_PIXELS} pixels, got {width}x"
                        f"{height}. Scale it down.", param=param)


def _rows_above(file: bytes, grid: Grid) -> int:
  """Returns the rows of tokens above a mask's transparent part.

  Raises:
    ApiError: if that part is not all that is below some row.
  """
  _check_size(file, "mask")
  try:
    mask = Image.open(io.BytesIO(file))
    alpha = np.asarray(mask.convert("RGBA"))[..., 3]
  except image_files.FAILURES as error:
    raise ApiError(400, "Expected a PNG as mask, got another file.",
                   param="mask") from error
  is_open = alpha == 0
  first = int(np.argmax(is_open.any(1))) if is_open.any() else len(alpha)
  if not is_open[first:].all():
    raise ApiError(400, "Expected a mask that is transparent from some row "
                        "down, as images are generated from top to bottom, got "
                        "another shape.", param="mask")
  return first * grid.rows // len(alpha)
