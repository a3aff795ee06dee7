"""TensorFlow datasets that are on disk, read without TensorFlow."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from ssd_jax.core.config import UserError
from ssd_jax.data.pictures import Source, Unreadable, to_square
from ssd_jax.data.tables import one_line

_CAPTION_KEYS = ("caption", "captions", "text", "label")


class TFDSSource(Source):
  """A split of a dataset as captioned images.

  Reads the datasets of `tfds.data_source` from their files alone: the code that
  builds a dataset often needs TensorFlow, its files do not.

  Args:
    name: TFDS name: `mnist`, `name/config` or `name:1.0.0`.
    split: TFDS split: `train` or `train[:1000]`.
    pixels: Side of the images.
    image_key: Path of the image feature, such as `image` or `views/front`.
    caption_key: Path of a text or class label feature; the first of several
      values is used. The default is the first of caption, captions, text and
      label that exists.
    data_dir: Folder of the datasets; TFDS's own by default.

  Raises:
    UserError: if the dataset is missing, empty, not in a format with random
      access, or lacks a feature.
  """

  def __init__(
      self, name: str, split: str, pixels: int, image_key: str = "image",
      caption_key: str = "", data_dir: str | None = None,
  ):
    self.name, self.split, self.pixels = name, split, pixels
    self._rows = _open(name, split, data_dir)
    if not len(self._rows):
      raise UserError(
          f"Expected images, got {name} with nothing in split {split!r}. "
          "Choose another split."
      )
    features = dict(_leaves(self._rows.dataset_info.features))
    wanted = (caption_key,) if caption_key else _CAPTION_KEYS
    self._image_key = _choose(features, "image_key", (image_key,), name)
    self._caption_key = _choose(features, "caption_key", wanted, name)
    caption = features[self._caption_key]
    self._label_names = getattr(caption, "names", None)
    self.keys = tuple(str(index) for index in range(len(self._rows)))

  def __getitem__(self, index: int) -> dict:
    try:
      row = self._rows[index]
      array = np.asarray(_at(row, self._image_key))
      array = array[..., 0] if array.shape[-1] == 1 else array
      image = to_square(Image.fromarray(array), self.pixels)
    except Exception as error:  # a decoder may raise anything on bad bytes
      name = f"item {index} of {self.name} split {self.split!r}"
      raise Unreadable({name: one_line(error)}, "Prepare again") from error
    try:
      caption = self._caption(_at(row, self._caption_key))
    except UnicodeDecodeError as error:
      raise UserError(
          f"Expected text, got {self._caption_key!r} of item {index} of "
          f"{self.name} split {self.split!r} that is not UTF-8 "
          f"({error.reason}). Choose another caption_key.") from error
    if not caption:
      raise UserError(
          "Expected a caption for every image, got no caption in "
          f"{self._caption_key!r} of item {index} of {self.name} split "
          f"{self.split!r}. Choose another caption_key or split."
      )
    return {"image": image, "caption": caption, "tags": ()}

  def _caption(self, value: Any) -> str:
    """Returns a value as a caption: text, a label, or the first of several."""
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value):
      value = value[0] if len(value) else b""
    if self._label_names is not None:
      # Unlabelled splits hold -1.
      is_label = 0 <= int(value) < len(self._label_names)
      return self._label_names[int(value)].replace("_", " ") * is_label
    text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
    return " ".join(text.split())


def _open(name: str, split: str, data_dir: str | None) -> Any:
  # Slow to import, and only needed here.
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  prepare = (
      f"Prepare it with `tfds build {name} --file_format=array_record` "
      "(preparing needs TensorFlow, reading does not)"
  )
  try:
    builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    return builder.as_data_source(split)
  except tfds.core.DatasetNotFoundError as error:
    raise UserError(
        "Expected a dataset that is in "
        f"{data_dir or tfds.core.constants.DATA_DIR}, got {name}. {prepare}."
    ) from error
  except NotImplementedError as error:
    raise UserError(
        f"Expected a format with random access, got {name} as "
        f"{builder.info.file_format.value}. {prepare}."
    ) from error
  except ValueError as error:
    raise UserError(
        f"Expected a split of one prepared dataset, got {name} split "
        f"{split!r} ({one_line(error)}). Choose another split."
    ) from error


def _leaves(feature: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (path, feature) of everything that is not a group or a list."""
  feature = getattr(feature, "feature", feature)  # the elements of a list
  if not hasattr(feature, "items"):
    yield path, feature
    return
  for name, child in feature.items():
    yield from _leaves(child, f"{path}/{name}" if path else name)


def _choose(
    features: dict[str, Any], setting: str, wanted: tuple[str, ...], name: str
) -> str:
  for key in wanted:
    if key in features:
      return key
  raise UserError(
      f"Expected one of {sorted(features)}, which {name} has, got "
      f"{setting}={' or '.join(wanted)}. Set {setting}."
  )


def _at(row: Any, path: str) -> Any:
  for part in path.split("/"):
    row = row[part]
  return row
