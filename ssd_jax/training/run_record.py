"""What a run was made from, kept beside its checkpoints.

  DIR/settings.json  settings, and identifiers of the parts of a model
  DIR/data.npz       digests of the images and captions, in order

A run that continues is compared with both, by content: files may move, and a
change is an error that says what changed. Folders of runs that began without a
record of something take it over from what they find.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.data.survey import Survey, digest
from ssd_jax.storage.files import read_json, replacing, write_json

_MAY_CHANGE = re.compile(
    r"\.loop\.(steps|keep|\w+_every)$|\.watch\.|\.draw\.batch$")
_PLACES = ("data", "prompts_file")  # what is there counts, once recorded
_NAMES = "names"


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
  """The images or the captions of a split.

  Attributes:
    kind: What is listed, "image" or "caption".
    names: Name of each, for messages.
    columns: Digests of what belongs to each, uint64 [n], by what it is.
  """

  kind: str
  names: tuple[str, ...]
  columns: Mapping[str, np.ndarray]

  @classmethod
  def of_images(cls, contents: Survey, captions: bool = True) -> "Listing":
    """Returns the listing of a source's items, with or without captions."""
    columns = {"image": contents.images}
    if captions:
      columns["caption"] = contents.digests()
    return cls("image", contents.source.keys, columns)

  @classmethod
  def of_texts(cls, texts: Iterable[str]) -> "Listing":
    """Returns the listing of captions without images."""
    return cls("caption", tuple(texts), {})

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the digests by column, those of the names among them."""
    seen: dict[str, int] = {}
    found = []
    for name in self.names:  # some may be equal
      seen[name] = seen.get(name, -1) + 1
      found.append(digest(f"{name}\n{seen[name]}"))
    return {_NAMES: np.array(found, np.uint64), **self.columns}

  def changes(
      self, before: Mapping[str, np.ndarray], everywhere_before: set[int],
      everywhere: set[int],
  ) -> Iterator[str]:
    """Yields how the listing differs from recorded arrays.

    Args:
      before: The recorded arrays of the split.
      everywhere_before: Recorded digests of names in all splits.
      everywhere: Digests of names in all splits.
    """
    now = self.arrays()
    names = now[_NAMES].tolist()
    old = {name: i for i, name in enumerate(before[_NAMES].tolist())}
    at = [old.get(name, -1) for name in names]
    added = [i for i, j in enumerate(at) if j < 0]
    new = [i for i in added if names[i] not in everywhere_before]
    if new:
      yield self._told(f"the new {self.kind}", new)
    moved = [i for i in added if names[i] in everywhere_before]
    if moved:
      yield self._told("another split for", moved)
    lost = len(old.keys() - everywhere)
    if lost:
      yield f"{lost} {self.kind}{'s' * (lost > 1)} fewer"
    for column in self.columns.keys() & before.keys():
      other = [i for i, j in enumerate(at)
               if j >= 0 and now[column][i] != before[column][j]]
      if other:
        yield self._told(f"another {column} for", other)
    if at != sorted(at) and not added and not lost:
      yield f"another order of the {self.kind}s"

  def _told(self, what: str, found: list[int]) -> str:
    name = self.names[found[0]]
    name = name if len(name) <= 60 else f"{name[:60]}..."
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{what} {name!r}{more}"


def begin(
    folder: pathlib.Path, settings: Mapping[str, Any],
    parts: Mapping[str, str], data: Mapping[str, Listing],
) -> None:
  """Records what a run is made from, or checks it when the run continues.

  Args:
    folder: Folder of the run.
    settings: Settings that the run depends on, nested.
    parts: Identifiers of what else it depends on, such as the trunk.
    data: Its images or captions, by split.

  Raises:
    UserError: if the run in `folder` began with anything else.
  """
  file, record = folder / "settings.json", folder / "data.npz"
  now = _flat(dict(settings))
  if (folder / "checkpoints").is_dir():
    found = _read(record)
    if found is not None:
      _check_data(folder, found, data)
    if file.is_file():
      begun = _read_settings(file)
      _check_parts(folder, begun.get("parts"), parts)
      _check_settings(folder, begun, now, found is not None)
  write_json(file, now | {"parts": dict(parts)})
  arrays: dict[str, Any] = {
      f"{split}/{name}": values for split, listing in data.items()
      for name, values in listing.arrays().items()}
  with replacing(record) as partial, open(partial, "wb") as out:
    np.savez(out, **arrays)


def _read(record: pathlib.Path) -> dict[str, np.ndarray] | None:
  """Returns the recorded arrays, or None for a run without them."""
  if not record.exists():
    return None
  try:
    with np.load(record) as file:
      return {name: file[name] for name in file}
  except Exception as error:  # zip and numpy raise many types
    raise UserError(
        f"Expected the record of a run's data, got a damaged {record}. If the "
        "data are unchanged, remove the file.") from error


def _read_settings(file: pathlib.Path) -> dict[str, Any]:
  begun = read_json(file)
  if not isinstance(begun, dict):
    raise UserError(
        f"Expected the settings of a run, got a damaged {file}. Choose "
        "another --workdir.")
  return begun


def _check_data(folder, found, data: Mapping[str, Listing]) -> None:
  changes: list[str] = []
  everywhere_before = _union(
      values for name, values in found.items() if name.endswith(f"/{_NAMES}"))
  everywhere = _union(listing.arrays()[_NAMES] for listing in data.values())
  for split, listing in data.items():
    before = {name.removeprefix(f"{split}/"): values
              for name, values in found.items() if name.startswith(f"{split}/")}
    if _NAMES in before:
      changes += listing.changes(before, everywhere_before, everywhere)
  if changes:
    raise UserError(
        f"Expected the data with which the run began, got {', '.join(changes)} "
        f"for the run in {folder}. Put them back or choose another --workdir.")


def _union(arrays: Iterable[np.ndarray]) -> set[int]:
  return set().union(*(array.tolist() for array in arrays))


def _check_parts(folder, begun: Any, parts: Mapping[str, str]) -> None:
  for name in parts.keys() & (begun if isinstance(begun, dict) else {}):
    if begun[name] != parts[name]:
      raise UserError(
          f"Expected the {name} with which the run began, got another {name} "
          f"for the run in {folder}. Put it back or choose another --workdir.")


def _check_settings(folder, begun, now, has_data: bool) -> None:
  skipped = {"parts", *(_PLACES if has_data else ())}
  for key in sorted(begun.keys() - skipped):  # newer settings had no values yet
    if begun[key] != now.get(key):
      raise UserError(
          f"Expected {key}={begun.get(key)}, with which the run began, got "
          f"{key}={now.get(key)} for the run in {folder}. Set it back or "
          "choose another --workdir.")


def _flat(values: Any, name: str = "") -> dict[str, Any]:
  """Returns settings by full name, as JSON stores them.

  Settings that may change between the starts of a run are left out.
  """
  if not isinstance(values, dict):
    value = list(values) if isinstance(values, tuple) else values
    return {} if _MAY_CHANGE.search(name) else {name: value}
  found: dict[str, Any] = {}
  for key, value in values.items():
    found |= _flat(value, f"{name}.{key}" if name else key)
  return found
