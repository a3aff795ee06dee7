"""Results of decoders, stored on disk batch by batch.

A shard holds one decoder's results for one batch of prompts. It is written
atomically, with a leading checksum, and its name encodes everything that it
depends on: an interrupted comparison continues from its shards, and one with
other settings, weights or code finds none.

N images; R rows and C columns of the grid; H, W pixels.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import platform
import sys
import types
from typing import Any

import jax
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.images import Images, OnDemand
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding import engine
from ssd_jax.pipeline import likelihood
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import sharding
from ssd_jax.storage.files import replacing

_VERSION = 3  # increment when the contents of shards change


@dataclasses.dataclass(frozen=True)
class Figures:
  """Figures of N generated images.

  Attributes:
    tokens: int32 [N, R, C], image tokens.
    passes: int32 [N], forward passes.
    commit_pass: int32 [N, R, C], pass in which each token became final.
    seconds: float64 [N], seconds of the image's batch over its size, without
      compilation.
    nll: float64 [N], mean NLL under the model, in nats per token.
    entropy: float64 [N], mean entropy of the model's predictions.
    memory: int64 [N], peak bytes of the program; -1 if unknown.
    session: int64 [N], the start of the command that generated the image;
      seconds are comparable within one session.
  """

  tokens: np.ndarray
  passes: np.ndarray
  commit_pass: np.ndarray
  seconds: np.ndarray
  nll: np.ndarray
  entropy: np.ndarray
  memory: np.ndarray
  session: np.ndarray


class Pictures(OnDemand):
  """Images, uint8 [H, W, 3] each, read from their shards on demand.

  A slice is an array [n, H, W, 3]. Only the last shard read stays in memory, so
  that thousands of large images can be compared.
  """

  def __init__(self, paths: Sequence[pathlib.Path], sizes: Sequence[int]):
    places = [
        (path, i) for path, size in zip(paths, sizes, strict=True)
        for i in range(size)]
    shard = functools.lru_cache(maxsize=1)(_read_images)
    super().__init__(places, lambda place: shard(place[0])[place[1]])


@dataclasses.dataclass(frozen=True)
class Run(Figures):
  """Images of a decoder and their figures.

  Attributes:
    images: N images whose slices are uint8 [n, H, W, 3].
  """

  images: Images


def key(
  weights: str, pipe: Pipeline, decoder: Decoder, facts: dict[str, Any]
) -> str:
  """Returns a digest of everything but the prompts that a shard depends on.

  The machine is included.

  Args:
    weights: Fingerprint of the parameters.
    pipe: The pipeline.
    decoder: Settings of the decoder.
    facts: Seed, batch and resolved sampling.
  """
  device, mesh = jax.devices()[0], sharding.current()
  config = dict(pipe.family.config)
  config.pop("sampling", None)  # the facts hold the resolved settings
  return digest(dict(
      facts, version=_VERSION, code=_code(type(pipe.family), type(decoder)),
      weights=weights, family=pipe.family.name,
      config=str(sorted(config.items())), prompts=_prompt_files(pipe),
      grid=repr(pipe.model.grid), decoder=repr(decoder), jax=jax.__version__,
      machine=platform.node(), devices=len(jax.devices()),
      mesh=None if mesh is None else dict(mesh.shape),
      device=f"{device.platform} {device.device_kind}"))


def _prompt_files(pipe: Pipeline) -> str:
  """Returns a checksum of the files with which a model encodes prompts."""
  folder = pipe.folders.get("model", pathlib.Path()) / "tokenizer"
  files = sorted(folder.glob("*")) if "model" in pipe.folders else []
  return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _code(*classes: type) -> str:
  """Returns a checksum of the classes' modules and of ours that they import."""
  found: set[str] = set()
  left = [c.__module__ for c in classes] + [
      engine.__name__, likelihood.__name__]
  while left:
    name = left.pop()
    if name in found or not name.startswith("ssd_jax."):
      continue
    found.add(name)
    for value in vars(sys.modules[name]).values():
      own = value if isinstance(value, types.ModuleType) else None
      origin = own.__name__ if own else getattr(value, "__module__", None)
      left.append(str(origin))
  files = sorted(str(sys.modules[name].__file__) for name in found)
  blobs = [pathlib.Path(file).read_bytes() for file in files + _own(classes)]
  return hashlib.sha256(b"".join(blobs)).hexdigest()


def _own(classes: Sequence[type]) -> list[str]:
  """Returns the files of user-defined classes, which need not be modules."""
  bases = [base for cls in classes for base in cls.__mro__]
  codes = [getattr(x, "__code__", None) for base in bases
           if not base.__module__.startswith("ssd_jax.")
           for x in vars(base).values()]
  files = {code.co_filename for code in codes if code}
  return sorted(file for file in files if pathlib.Path(file).is_file())


def fingerprint(tree: Any) -> str:
  """Returns a checksum of all arrays of a tree and of their names."""
  total = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    array = np.ascontiguousarray(leaf)
    name = f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}"
    total.update(name.encode())
    total.update(array.reshape(-1).view(np.uint8).data)
  return total.hexdigest()


def digest(value: Any) -> str:
  """Returns a short digest of a JSON value."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(path: pathlib.Path, run: Run) -> None:
  """Writes the results of one batch, atomically.

  Raises:
    UserError: if the disk is full or the folder is not writable.
  """
  figures = {f.name: getattr(run, f.name) for f in dataclasses.fields(Figures)}
  buffer = io.BytesIO()
  np.savez_compressed(buffer, images=run.images[:], **figures)
  blob = buffer.getvalue()
  with replacing(path) as partial:
    partial.write_bytes(hashlib.sha256(blob).digest() + blob)


def is_whole(path: pathlib.Path) -> bool:
  """Returns whether a shard exists and is undamaged."""
  return _blob(path) is not None


def collect(paths: Sequence[pathlib.Path]) -> Run:
  """Returns the shards of a decoder as one run.

  Raises:
    UserError: if a shard is missing or damaged.
  """
  shards = [_read_figures(path) for path in paths]
  sizes = [len(shard["passes"]) for shard in shards]
  joined = {
      field.name: np.concatenate([shard[field.name] for shard in shards])
      for field in dataclasses.fields(Figures)}
  return Run(**joined, images=Pictures(paths, sizes))


def _blob(path: pathlib.Path) -> bytes | None:
  """Returns the bytes of a shard's arrays, or None if missing or damaged."""
  blob = path.read_bytes() if path.is_file() else b""
  if hashlib.sha256(blob[32:]).digest() != blob[:32]:
    return None
  return blob[32:]


def _arrays(path: pathlib.Path, names: Sequence[str]) -> dict[str, np.ndarray]:
  blob = _blob(path)
  if blob is None:
    raise UserError(
        f"Expected a complete shard, got {path}, which is missing or damaged. "
        "Start the command again.")
  with np.load(io.BytesIO(blob)) as arrays:
    return {name: arrays[name] for name in names}


def _read_figures(path: pathlib.Path) -> dict[str, np.ndarray]:
  return _arrays(path, [field.name for field in dataclasses.fields(Figures)])


def _read_images(path: pathlib.Path) -> np.ndarray:
  return _arrays(path, ["images"])["images"]
