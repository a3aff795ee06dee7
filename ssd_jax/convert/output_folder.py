"""Where a conversion works and how its folder appears.

The folder is made beside the target, on the target's file system, and put in
place by one rename. A target that is the top of a file system, such as a volume
of a container, cannot be renamed to, and a rename to the current folder would
leave the user's shell in the old one: there the folder is made inside, its
parts are moved up, and model.json, without which it is no model, comes last.
"""

import os
import pathlib
import shutil
from typing import Any

from ssd_jax.core.config import UserError
from ssd_jax.storage.files import read_json, storable_folder

_INSIDE = ".converting"
_LAST = "model.json"
_FILES = 2_000_000  # bytes for settings, indices and half-filled blocks
_SYSTEMS = ("lost+found",)  # what a new file system holds


def resolved(out: str | os.PathLike) -> pathlib.Path:
  """Returns the folder that a name stands for, links and ".." resolved."""
  return storable_folder(out)


def work_folder(out: pathlib.Path) -> pathlib.Path:
  """Returns the folder in which a conversion to a resolved `out` works."""
  is_kept = out.is_dir() and (os.path.ismount(out) or out == _here())
  if is_kept or (out / _INSIDE).is_dir():  # begun there
    return out / _INSIDE
  return out.with_name(f".{out.name}.converting")


def _here() -> pathlib.Path | None:
  """Returns the current folder, unless it was removed."""
  try:
    return pathlib.Path.cwd()
  except OSError:
    return None


def report_of(out: pathlib.Path, fingerprint: str) -> dict[str, Any] | None:
  """Returns the report in `out` if it holds this conversion, None if empty.

  Also removes the work folder of a conversion that was interrupted at its end.

  Raises:
    UserError: `out` holds something else.
  """
  work = work_folder(out)
  held = set(os.listdir(out)) - {*_SYSTEMS, _INSIDE} if out.is_dir() else set()
  is_moving = work.parent == out and (work / "model" / _LAST).is_file()
  if is_moving or not (held or out.is_file()):
    return None
  file = out / "report.json"
  report = read_json(file, dict) if file.is_file() else {}
  if report.get("fingerprint") != fingerprint:
    raise UserError(f"Expected a new folder, got {out}, which holds something "
                    "else. Choose another --out or remove it.")
  shutil.rmtree(work, ignore_errors=True)
  return report


def check_disk(size: int, work: pathlib.Path) -> None:
  """Raises UserError if so many bytes do not fit beside what was written."""
  above = next(p for p in work.parents if p.is_dir())
  written = sum(f.stat().st_size for f in work.rglob("*") if f.is_file())
  free, needed = shutil.disk_usage(above).free, size - written
  if needed * 1.02 + _FILES > free:
    raise UserError(
        f"Expected {_size(needed * 1.02 + _FILES)} of free disk space, got "
        f"{_size(free)} free at {above}. Free some space, or choose another "
        "--out.")


def _size(count: float) -> str:
  return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def put_in_place(model: pathlib.Path, out: pathlib.Path) -> None:
  """Moves a finished folder from the work folder to `out`."""
  if model.parent.parent != out:
    os.rename(model, out)
    return
  for name in sorted(os.listdir(model), key=lambda name: (name == _LAST, name)):
    os.rename(model / name, out / name)


def take_back(out: pathlib.Path, work: pathlib.Path) -> None:
  """Undoes a `put_in_place` that was interrupted."""
  if work.parent == out and (work / "model" / _LAST).is_file():
    for name in set(os.listdir(out)) - {*_SYSTEMS, _INSIDE}:
      os.rename(out / name, work / "model" / name)
