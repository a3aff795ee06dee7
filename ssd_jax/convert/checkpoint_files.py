"""The files of a checkpoint in a folder, and all of their tensors."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import pathlib
import re

from ssd_jax.convert import tensors
from ssd_jax.convert.tensors import SafeTensor, Tensor
from ssd_jax.core.config import UserError
from ssd_jax.storage.files import is_pointer

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Files that trainers, systems and downloads leave beside the weights.
_OTHERS = re.compile(
    r"\..*|(training_args|optim|scheduler|scaler|rng_state|random_states)[^/]*"
    r"|[^/]*optim_states[^/]*", re.IGNORECASE)
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(\.[^./]+)")
_VARIANT = re.compile(r"(.*)\.[^./]+(\.[^./]+)")  # model.fp16.safetensors


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """All tensors of a checkpoint by name, and the files they are in."""

  tensors: Mapping[str, Tensor | SafeTensor]
  files: tuple[pathlib.Path, ...]


def open_checkpoint(
    folder: pathlib.Path, patterns: Sequence[str]
) -> Checkpoint:
  """Opens the files that match the first matching pattern.

  Args:
    folder: Folder of the checkpoint, or one of its files.
    patterns: Globs, tried in order; an index represents the files it names.

  Raises:
    UserError: No file matches, a file is missing or damaged, or two tensors
      have the same name.
  """
  files = _files(folder, patterns)
  missing = [file.name for file in files if not file.exists()]
  if missing:
    raise UserError("Expected the files of the index beside it, got an index "
                    f"in {folder} that names the missing {', '.join(missing)}. "
                    "Download them.")
  found: dict[str, Tensor | SafeTensor] = {}
  for file in files:
    check_contents(file)
    for name, tensor in tensors.read_file(file).items():
      if name in found:
        raise UserError(
            f"Expected each tensor once, got tensor {name!r} in both "
            f"{found[name].file.name} and {file.name}. Remove the file that "
            "does not belong to the checkpoint.")
      found[name] = tensor
  return Checkpoint(found, tuple(files))


def _files(
    folder: pathlib.Path, patterns: Sequence[str]
) -> list[pathlib.Path]:
  if folder.is_file():
    return [folder]
  if not folder.is_dir():
    raise UserError("Expected the file or folder of a checkpoint, got no file "
                    f"or folder at {folder}. Check the path.")
  found = matching(folder, patterns)
  if found and found[0].name in INDEXES:
    return index_files(found[0])
  if found:
    _check_shards(folder, [file.name for file in found])
    return found
  raise UserError(
      f"Expected a folder with a checkpoint, got {folder} without any of "
      f"{', '.join(patterns)}. Check the folder.")


def _check_shards(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Raises UserError if a file says that there are others, which there are not.
  """
  for shard in filter(None, map(_SHARD.fullmatch, names)):
    stem, number, count, suffix = shard.groups()
    every = [f"{stem}-{i:0{len(number)}}-of-{count}{suffix}"
             for i in range(1, min(int(count), 9999) + 1)]
    missing = [name for name in every if name not in names]
    if missing:
      raise UserError(
          f"Expected all {int(count)} files of a checkpoint, got {folder} "
          f"without {', '.join(missing[:3])}"
          f"{' and others' * (len(missing) > 3)}. Download them.")


def matching(
    folder: pathlib.Path, patterns: Sequence[str]
) -> list[pathlib.Path]:
  """Returns the files that match the first matching glob."""
  for pattern in patterns:
    names = (x.relative_to(folder).as_posix() for x in folder.glob(pattern))
    found = published(names)
    if found:
      return [folder / name for name in found]
  return []


def published(names: Iterable[str]) -> list[str]:
  """Returns the names of a checkpoint's own files, sorted.

  Left out are what trainers and systems write beside them, and variants such as
  model.fp16.safetensors beside model.safetensors.
  """
  kept = sorted(x for x in names if not _OTHERS.fullmatch(x.split("/")[-1]))
  is_variant = lambda name: _VARIANT.fullmatch(name) and _VARIANT.sub(
      r"\1\2", name) in kept
  return [name for name in kept if not is_variant(name)]


def check_contents(file: pathlib.Path) -> None:
  """Raises UserError if a file is empty or a pointer of Git LFS."""
  if not file.is_file():
    raise UserError(f"Expected a file, got {file}, which is none. Download it "
                    "again.")
  if is_pointer(file):
    raise UserError(
        f"Expected the file itself, got {file}, a pointer of Git LFS. Run git "
        "lfs pull in its folder, or download it again.")
  if not file.stat().st_size:
    raise UserError(
        f"Expected a file with contents, got the empty {file}. Download it "
        "again.")


def index_files(index: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that an index names.

  Raises:
    UserError: The index is damaged or names no files.
  """
  check_contents(index)
  try:
    named = json.loads(index.read_text("utf-8"))["weight_map"].values()
    files = [index.parent / name for name in sorted(set(named))]
  except (ValueError, KeyError, TypeError, AttributeError,
          RecursionError) as error:
    raise UserError(f"Expected JSON with a weight_map, got a damaged {index}. "
                    "Download it again.") from error
  if not files:
    raise UserError(f"Expected an index of files, got {index}, which names "
                    "none. Download it again.")
  return files
