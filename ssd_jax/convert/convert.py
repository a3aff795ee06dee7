"""Converts published PyTorch checkpoints to a folder of orbax checkpoints.

Tensors are read, converted and written one at a time, or in pieces if they are
large, so memory use stays far below the size of a model. The conversion works
in a folder beside the target, with a journal of completed pieces: an
interrupted conversion resumes where it stopped, and the target appears by one
rename (`output_folder`).
"""

from collections.abc import Callable, Container, Iterable
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from typing import Any

import ml_dtypes
import numpy as np

from ssd_jax.convert import (
  checkpoint_files,
  checks,
  output_folder,
  wrapper_names,
)
from ssd_jax.convert.checkpoint_files import Checkpoint
from ssd_jax.convert.recipes import Part, Recipe, Row
from ssd_jax.core.config import UserError
from ssd_jax.storage import array_store, checkpoints, model_settings
from ssd_jax.storage.files import write_json

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@dataclasses.dataclass(frozen=True)
class Unit:
  """A piece that is read, written and entered in the journal at a time."""

  part: int
  row: Row
  start: int
  stop: int | None

  @property
  def name(self) -> str:
    """Name of the piece, unique in a conversion."""
    layer = "" if self.row.layer is None else f"[{self.row.layer}]"
    return f"{self.row.target}{layer}@{self.row.at + self.start}"


@dataclasses.dataclass(frozen=True)
class Job:
  """A validated conversion.

  Attributes:
    recipe: Recipe of the model folder.
    found: The opened checkpoint of each part.
    assets: Files to copy.
    dtype: Type of the trunk and the text encoder; image tokenizers stay in
      float32.
  """

  recipe: Recipe
  found: tuple[Checkpoint, ...]
  assets: tuple[pathlib.Path, ...]
  dtype: str

  @functools.cached_property
  def leaves(self) -> dict[str, Any]:
    """Shape and stored dtype of all arrays, by path."""
    wanted = lambda path: (
        np.float32 if path.startswith("vq/") else DTYPES[self.dtype])
    return {path: (leaf.shape, np.dtype(wanted(path)))
            for part in self.recipe.parts for path, leaf in part.leaves.items()}

  @property
  def size(self) -> int:
    """Number of bytes to write."""
    return sum(math.prod(shape) * dtype.itemsize
               for shape, dtype in self.leaves.values())

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of the files, the settings and the dtype."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns)
             for found in self.found for f in found.files]
    sha256 = lambda data: hashlib.sha256(data).hexdigest()
    assets = [(f.name, f.stat().st_size, sha256(f.read_bytes()))
              for f in self.assets]
    text = json.dumps([files, assets, self.recipe.family, self.recipe.settings,
                       self.dtype], sort_keys=True)
    return sha256(text.encode())

  def units(self) -> Iterable[Unit]:
    """Yields all pieces of the conversion."""
    for index, part in enumerate(self.recipe.parts):
      for row in part.table.rows:
        if not row.is_divisible:
          yield Unit(index, row, 0, None)
          continue
        source = row.sources[0]
        first, stop = source.rows or (0, source.shape[0])
        shape = (stop - first, *source.shape[1:])
        step = array_store.rows_per_piece(shape)
        for start in range(0, shape[0], step):
          yield Unit(index, row, start, min(start + step, shape[0]))


def open_job(
    recipe: Recipe, folders: dict[str, pathlib.Path], dtype: str
) -> Job:
  """Opens and validates a conversion of the checkpoints in `folders`.

  Args:
    recipe: Recipe of the family.
    folders: Folder of each flag: "source", "vq", "text_encoder", "tokenizer";
      missing ones are looked up in "source".
    dtype: A key of DTYPES.

  Raises:
    UserError: Files are missing, damaged, or belong to another family.
  """
  if dtype not in DTYPES:
    raise UserError(
        f"Expected --dtype to be one of {sorted(DTYPES)}, got {dtype!r}.")
  found, parts = [], []
  for part in recipe.parts:
    checkpoint = wrapper_names.unwrapped(_open(part, folders), part.required)
    parts.append(part := part.resolved(checkpoint.tensors))
    checks.check_family(recipe, part, checkpoint)
    checks.check_table(part, checkpoint)
    checks.check_dtypes(part, checkpoint)
    found.append(checkpoint)
  assets = tuple(_asset(folders, pattern) for pattern in recipe.tokenizer)
  checks.check_tokenizer(recipe, assets)
  recipe = dataclasses.replace(recipe, parts=tuple(parts))
  return Job(recipe, tuple(found), assets, dtype)


def _open(part: Part, folders: dict[str, pathlib.Path]) -> Checkpoint:
  if part.flag in folders:
    return checkpoint_files.open_checkpoint(folders[part.flag], part.patterns)
  source = folders["source"]
  inside = source if source.is_dir() else source.parent
  if not checkpoint_files.matching(inside, part.source_patterns):
    raise UserError(
        f"Expected a folder with the {part.flag.replace('_', ' ')}, got "
        f"{inside} without any of {', '.join(part.source_patterns)}. Pass its "
        f"location with --{part.flag}.")
  return checkpoint_files.open_checkpoint(inside, part.source_patterns)


def tokenizer_flags(given: Container[str]) -> tuple[str, ...]:
  """Returns the flags of locations that may hold the tokenizer, in order."""
  return ("tokenizer",) if "tokenizer" in given else ("source", "text_encoder")


def _asset(folders: dict[str, pathlib.Path], pattern: str) -> pathlib.Path:
  """Finds a file of the tokenizer at its own or the other parts' locations."""
  paths = [folders[flag] for flag in tokenizer_flags(folders)
           if flag in folders]
  for path in paths:
    folder = path if path.is_dir() else path.parent
    files = checkpoint_files.matching(folder, [pattern])
    if files:
      checkpoint_files.check_contents(files[0])
      return files[0]
  raise UserError(
      "Expected a folder with the tokenizer's files, got "
      f"{' and '.join(map(str, paths))} without {pattern}. Pass their location "
      "with --tokenizer.")


def convert(
    job: Job, out: pathlib.Path,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
  """Runs a conversion into the new folder `out`.

  Args:
    job: The conversion.
    out: The folder; it must not exist, or hold the same conversion.
    progress: Called with the number of bytes written.

  Returns:
    The report of the conversion.

  Raises:
    UserError: `out` holds something else, the disk is too small, or another
      conversion writes to `out`.
  """
  out = output_folder.resolved(out)
  report = existing_report(job, out)
  if report is not None:
    return report
  work = output_folder.work_folder(out)
  output_folder.check_disk(job.size, work)
  work.mkdir(parents=True, exist_ok=True)
  with open(work / "lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
          f"Expected one conversion to {out} at a time, got {out} while "
          "another conversion writes it. Wait for it.") from error
    output_folder.take_back(out, work)
    start = time.monotonic()
    try:
      done = _write_arrays(job, work, progress)
    except checks.BadWeights:
      shutil.rmtree(work, ignore_errors=True)
      raise
    report = _assemble(job, work, done, time.monotonic() - start)
    output_folder.put_in_place(work / "model", out)
  shutil.rmtree(work, ignore_errors=True)
  return report


def existing_report(job: Job, out: pathlib.Path) -> dict[str, Any] | None:
  """Returns the report in `out` if it holds this conversion, None if empty.

  Raises:
    UserError: `out` holds something else.
  """
  return output_folder.report_of(output_folder.resolved(out), job.fingerprint)


def _write_arrays(job: Job, work: pathlib.Path, progress) -> dict[str, dict]:
  """Writes missing pieces; returns the journal's entries by piece."""
  journal, arrays = work / "journal.jsonl", work / "arrays"
  noted = array_store.read_journal(journal, job.fingerprint)
  if noted:
    array_store.move_back(arrays, work / "model", job.leaves)
  else:
    shutil.rmtree(arrays, ignore_errors=True)
  shutil.rmtree(work / "model", ignore_errors=True)
  done = _verified_entries(job, arrays, noted)
  array_store.write_journal(journal, job.fingerprint, done.values())
  with open(journal, "a") as f:
    for unit in job.units():
      if unit.name not in done:
        done[unit.name] = entry = _write_unit(job, arrays, unit)
        f.write(json.dumps(entry) + "\n")
        f.flush()
      progress(done[unit.name]["bytes"])
  return done


def _verified_entries(
    job: Job, arrays: pathlib.Path, noted: dict[str, dict]
) -> dict[str, dict]:
  """Returns journal entries of intact arrays; removes all other arrays.

  Disks write late, so pieces in the journal may be missing after a crash.
  """
  entries: dict[str, list[dict]] = {path: [] for path in job.leaves}
  for unit in job.units():
    if unit.name in noted:
      entries[unit.row.target].append(noted[unit.name])
  kept: dict[str, dict] = {}
  for path, mine in entries.items():
    folder = array_store.array_folder(arrays, path)
    shape, dtype = job.leaves[path]
    if mine and array_store.holds(folder, shape, dtype, mine):
      kept |= {entry["unit"]: entry for entry in mine}
    else:
      shutil.rmtree(folder, ignore_errors=True)
  return kept


def _write_unit(job: Job, arrays: pathlib.Path, unit: Unit) -> dict[str, Any]:
  """Writes one piece; returns its journal entry."""
  row, found = unit.row, job.found[unit.part].tensors
  read = []
  for source in row.sources:
    first = source.rows[0] if source.rows else 0
    stop = source.rows[1] if source.rows else unit.stop
    stop = stop if unit.stop is None else first + unit.stop
    read.append(found[source.name].read(first + unit.start, stop))
  shape, dtype = job.leaves[row.target]
  with np.errstate(over="ignore"):  # reported
    value = np.ascontiguousarray(row.convert(*read).astype(dtype))
  names_read = [source.name for source in row.sources]
  checks.check_finite(
      value, read, [found[name] for name in names_read], names_read)
  is_layer = row.layer is not None
  value = value[None] if is_layer else value
  first = row.at + unit.start if row.layer is None else row.layer
  array_store.write(
    array_store.array_folder(arrays, row.target), shape, value, first, is_layer
  )
  return {
      "unit": unit.name, "sources": names_read,
      "first": first, "rows": len(value), "bytes": value.nbytes,
      "sha256": array_store.digest(value),
  }


def _assemble(
    job: Job, work: pathlib.Path, done: dict[str, dict], seconds: float
) -> dict[str, Any]:
  """Assembles the model folder from the arrays; returns the report."""
  model = work / "model"
  for top in sorted({path.split("/")[0] for path in job.leaves}):
    paths = [p for p in job.leaves if p.startswith(top + "/")]
    array_store.write_skeleton(model / top, [p.split("/")[1:] for p in paths])
    for path in paths:
      shutil.rmtree(array_store.array_folder(model, path), ignore_errors=True)
      os.rename(array_store.array_folder(work / "arrays", path),
                array_store.array_folder(model, path))
    write_json(
      model / top / checkpoints.CHECKSUMS,
      {
        path.partition("/")[2]: array_store.checksum(
          array_store.array_folder(model, path)
        )
        for path in paths
      },
    )
  (model / "tokenizer").mkdir(exist_ok=True)
  for file in job.assets:
    shutil.copyfile(file, model / "tokenizer" / file.name)
  model_settings.write(
      model / "model.json",
      {"family": job.recipe.family, **job.recipe.settings})
  report = _report(job, done, seconds)
  write_json(model / "report.json", report)
  return report


def _report(job: Job, done: dict[str, dict], seconds: float) -> dict[str, Any]:
  counts: dict[str, int] = {}
  for path, (shape, _) in job.leaves.items():
    top = path.split("/")[0]
    counts[top] = counts.get(top, 0) + math.prod(shape)
  return {
      "fingerprint": job.fingerprint, "family": job.recipe.family,
      "dtype": job.dtype, "parameters": counts, "bytes": job.size,
      "seconds": round(seconds, 1),
      "files": [{"name": f.name, "bytes": f.stat().st_size}
                for found in job.found for f in found.files],
      "arrays": [{"array": e["unit"], "from": e["sources"],
                  "sha256": e["sha256"]}
                 for e in (done[unit.name] for unit in job.units())],
  }
