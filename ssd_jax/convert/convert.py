"""Converts published PyTorch checkpoints to a folder of orbax checkpoints.

Tensors are read, converted and written one at a time, or in pieces if they are
large, so memory use stays far below the size of a model. The conversion works
in a folder beside the target, with a journal of completed pieces: an
interrupted conversion resumes where it stopped, and the target appears by one
rename.
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
import re
import shutil
import time
from typing import Any

import ml_dtypes
import numpy as np

from ssd_jax.convert import recipes, tensors
from ssd_jax.convert.recipes import Part, Recipe, Row
from ssd_jax.convert.tensors import Checkpoint
from ssd_jax.core.config import UserError
from ssd_jax.storage import array_store, checkpoints
from ssd_jax.storage.files import read_json, write_json

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_SHOWN = 6  # names listed in an error


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
        if row.convert is not recipes.copy or row.layer is not None:
          yield Unit(index, row, 0, None)
          continue
        shape = row.sources[0].shape
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
  found = []
  for part in recipe.parts:
    checkpoint = _open(part, folders)
    _check_family(recipe, part, checkpoint)
    check_table(part, checkpoint)
    found.append(checkpoint)
  assets = tuple(_asset(folders, pattern) for pattern in recipe.tokenizer)
  return Job(recipe, tuple(found), assets, dtype)


def _open(part: Part, folders: dict[str, pathlib.Path]) -> Checkpoint:
  if part.flag in folders:
    return tensors.open_checkpoint(folders[part.flag], part.patterns)
  source = folders["source"]
  inside = source if source.is_dir() else source.parent
  if not any(any(inside.glob(pattern)) for pattern in part.source_patterns):
    raise UserError(
        f"Expected a folder with the {part.flag.replace('_', ' ')}, got "
        f"{inside} without any of {', '.join(part.source_patterns)}. Pass its "
        f"location with --{part.flag}.")
  return tensors.open_checkpoint(inside, part.source_patterns)


def tokenizer_flags(given: Container[str]) -> tuple[str, ...]:
  """Returns the flags of locations that may hold the tokenizer, in order."""
  return ("tokenizer",) if "tokenizer" in given else ("source", "text_encoder")


def _asset(folders: dict[str, pathlib.Path], pattern: str) -> pathlib.Path:
  """Finds a file of the tokenizer at its own or the other parts' locations."""
  paths = [folders[flag] for flag in tokenizer_flags(folders)
           if flag in folders]
  for path in paths:
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob(pattern))
    if files:
      return files[0]
  raise UserError(
      "Expected a folder with the tokenizer's files, got "
      f"{' and '.join(map(str, paths))} without {pattern}. Pass their location "
      "with --tokenizer.")


_SIGNATURES = {  # name of a tensor that only this family has -> family
    "layers.0.attention.wqkv.weight": "llamagen",
    "gen_embed.weight": "janus",
    "layers.0.attention.wq.weight": "anole",
    "model.layers.0.self_attn.q_norm.weight": "lumina or anole:hf",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "T5",
    "decoder.time_conv.0.conv.conv.weight": "an Emu3 tokenizer",
}


def _check_family(recipe: Recipe, part: Part, found: Checkpoint) -> None:
  expected = {s.name for row in part.table.rows for s in row.sources}
  if len(expected - set(found.tensors)) <= len(expected) // 2:
    return
  guess = [family for name, family in _SIGNATURES.items()
           if name in found.tensors and name not in expected]
  looks = f" that looks like {guess[0]}" if guess else ""
  raise UserError(
      f"Expected a checkpoint of {recipe.family} with tensors such as "
      f"{min(expected)}, got a checkpoint{looks} in {found.files[0].name}. "
      "Choose the --config of its family, or another folder.")


def check_table(part: Part, found: Checkpoint) -> None:
  """Raises UserError if tensors are missing, unknown or of the wrong shape."""
  expected = {s.name: (s.shape, *s.others)
              for row in part.table.rows for s in row.sources}
  ignored = [re.compile(pattern) for pattern in part.table.ignored]
  present = set(found.tensors)
  problems = {
      "missing": sorted(set(expected) - present),
      "unknown": sorted(
          name for name in present - set(expected)
          if not any(p.fullmatch(name) for p in ignored)),
      "misshaped": sorted(
          f"{name} {found.tensors[name].shape} for {shapes[0]}"
          for name, shapes in expected.items()
          if name in present and found.tensors[name].shape not in shapes),
  }
  found_problems = [
      _listing(kind, items) for kind, items in problems.items() if items]
  if found_problems:
    raise UserError(
        "Expected every tensor of this family and variant once, got "
        f"{found.files[0].name} with {'; '.join(found_problems)}. Choose the "
        "variant of --config that matches the checkpoint.")


def _listing(kind: str, items: list[str]) -> str:
  rest = len(items) - _SHOWN
  more = f" and {rest} more" if rest > 0 else ""
  return f"{len(items)} {kind} tensors ({', '.join(items[:_SHOWN])}{more})"


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
  out = out.absolute()
  report = existing_report(job, out)
  if report is not None:
    return report
  work = _work_folder(out)
  _check_disk(job, out, work)
  work.mkdir(parents=True, exist_ok=True)
  with open(work / "lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
          f"Expected one conversion to {out} at a time, got {out} while "
          "another conversion writes it. Wait for it.") from error
    start = time.monotonic()
    done = _write_arrays(job, work, progress)
    report = _assemble(job, work, done, time.monotonic() - start)
    os.rename(work / "model", out)
  shutil.rmtree(work, ignore_errors=True)
  return report


def _work_folder(out: pathlib.Path) -> pathlib.Path:
  return out.with_name(f".{out.name}.converting")


def existing_report(job: Job, out: pathlib.Path) -> dict[str, Any] | None:
  """Returns the report in `out` if it holds this conversion, None if empty.

  Also removes the work folder of a conversion that was interrupted at its end.

  Raises:
    UserError: `out` holds something else.
  """
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return None
  file = out / "report.json"
  report = read_json(file) if file.is_file() else {}
  if report.get("fingerprint") != job.fingerprint:
    raise UserError(f"Expected a new folder, got {out}, which holds something "
                    "else. Choose another --out or remove it.")
  shutil.rmtree(_work_folder(out.absolute()), ignore_errors=True)
  return report


def _check_disk(job: Job, out: pathlib.Path, work: pathlib.Path) -> None:
  above = next(p for p in out.parents if p.is_dir())
  written = sum(f.stat().st_size for f in work.rglob("*") if f.is_file())
  free, needed = shutil.disk_usage(above).free, job.size - written
  if needed * 1.02 > free:
    raise UserError(
        f"Expected {needed * 1.02 / 1e9:.1f} GB of free disk space, got "
        f"{free / 1e9:.1f} GB free at {above}. Free some space, or choose "
        "another --out.")


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
  value = np.ascontiguousarray(row.convert(*read).astype(dtype))
  is_layer = row.layer is not None
  value = value[None] if is_layer else value
  first = row.at + unit.start if row.layer is None else row.layer
  array_store.write(
    array_store.array_folder(arrays, row.target), shape, value, first, is_layer
  )
  return {
      "unit": unit.name, "sources": [s.name for s in row.sources],
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
  write_json(
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
