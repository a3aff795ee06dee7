"""Files of generated images: shards of tokens, and what these depend on.

  manifest.json              everything that the tokens depend on
  tokens-00000-of-00079.npz  tokens of some images, and their indices

A file appears with one rename, and is whole once it is there.
"""

from collections.abc import Callable, Container
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.models.fingerprint import same_trunk
from ssd_jax.storage.files import replacing

_FIRST_DECODER = "ar"  # of folders whose manifest names none


def claim(
    folder: pathlib.Path, manifest: dict[str, Any],
    newer: Container[str] = (),
) -> str:
  """Writes the manifest, or checks that the existing one is equal.

  Args:
    folder: Folder of the images.
    manifest: What they depend on.
    newer: Names of entries that older manifests do not hold.

  Returns:
    The decoder with which the folder was begun.
  """
  path = folder / "manifest.json"
  if not path.exists():
    _replace(path, lambda file: file.write(
        json.dumps(manifest, indent=1).encode("utf-8")))
  try:
    found = dict(json.loads(path.read_text("utf-8")))
  except (ValueError, TypeError) as error:
    raise UserError(
        f"Expected a manifest, got a damaged {path}. Remove {folder}."
    ) from error
  if "decoder" not in found:
    found["decoder"] = _FIRST_DECODER
    if manifest["decoder"] != _FIRST_DECODER:
      print(f"note: {folder} was begun with {_FIRST_DECODER}, which generates "
            f"what is missing of it, not {manifest['decoder']}",
            file=sys.stderr)
    manifest = manifest | {"decoder": _FIRST_DECODER}
  for name, value in manifest.items():
    same = same_trunk if name == "trunk" else lambda a, b: a == b
    if name in newer and name not in found:
      continue
    if name not in found or not same(found[name], value):
      raise UserError(
          f"Expected the images of this run, got images in {folder} whose "
          f"{name} differs. Use another workdir or remove the folder."
      )
  return str(found["decoder"])


def paths(
    folder: pathlib.Path, count: int, size: int
) -> list[tuple[pathlib.Path, np.ndarray]]:
  """Returns the path and the image indices of each shard."""
  starts = range(0, count, size)
  return [
      (_shard_file(folder / f"tokens-{i:05d}-of-{len(starts):05d}"),
       np.arange(start, min(start + size, count)))
      for i, start in enumerate(starts)
  ]


def _shard_file(stem: pathlib.Path) -> pathlib.Path:
  """Returns the file of a shard; .npy, without checksums, is an older form."""
  older = stem.with_name(f"{stem.name}.npy")
  return older if older.exists() else stem.with_name(f"{stem.name}.npz")


def write(
    path: pathlib.Path, tokens: np.ndarray, images: np.ndarray
) -> None:
  """Writes the tokens of some images atomically."""
  _replace(path, lambda file: np.savez(file, tokens=tokens, images=images))


def _replace(path: pathlib.Path, write: Callable) -> None:
  """Writes a file atomically; once visible, it survives a power cut."""
  with replacing(path) as partial, open(partial, "wb") as file:
    write(file)
    file.flush()
    os.fsync(file.fileno())


def read(
    path: pathlib.Path, images: np.ndarray, shape: tuple[int, int], vocab: int
) -> np.ndarray:
  """Returns the tokens of a shard of these images."""
  try:
    tokens = np.load(path)
    if path.suffix == ".npz":
      with tokens as file:  # zip verifies its own checksums
        tokens, known = file["tokens"], file["images"]
      if not np.array_equal(known, images):
        raise ValueError("of other images")
  except Exception as error:  # zip and numpy raise many types
    raise UserError(
        f"Expected {shape[0]} images, got a damaged {path}. Remove it to "
        "generate them again."
    ) from error
  if tokens.shape != shape:
    raise UserError(
        f"Expected tokens of shape {shape}, got {path} of shape "
        f"{tokens.shape}. Remove it to generate them again."
    )
  if tokens.dtype.kind != "u" or tokens.max() >= vocab:
    raise UserError(
        f"Expected tokens below {vocab}, got a damaged {path}. Remove it to "
        "generate them again.")
  return tokens
