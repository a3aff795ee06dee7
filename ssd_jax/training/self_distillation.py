"""Self-distilled data: images drawn by the frozen trunk, kept as tokens.

Hidden states are recomputed when they are needed; stored, they would be a
thousand times as large. Images are drawn in shards. A shard appears by one
rename, and what it holds depends on the manifest alone, so a run that was
killed at any moment continues without a sample lost or drawn twice.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import pathlib
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Params, Prompt
from ssd_jax.data import stream as data_stream
from ssd_jax.decoding import engine
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.models.fingerprint import fingerprint, same_trunk
from ssd_jax.models.generator import Generator
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage.files import replacing
from ssd_jax.training.preemption import Preemption


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
  """The frozen trunk and how it is sampled.

  Attributes:
    generator: Its functions.
    params: {"trunk": ...}.
    encode_prompts: (texts, guided) -> (prompt with the conditional rows, then,
      if guided, the unconditional ones; notes).
    sampling: Of its images.
    guided: Whether both streams are run.
  """

  generator: Generator
  params: Params
  encode_prompts: Callable[[Sequence[str], bool], tuple[Prompt, list[str]]]
  sampling: Sampling
  guided: bool


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """How images are drawn.

  Attributes:
    batch: Images drawn together, over all devices.
    shard: Images per file; what a killed run draws again at most.
    seed: Of the images.
  """

  batch: int = 16
  shard: int = 256
  seed: int = 0

  def __post_init__(self):
    check(self.batch >= 1, "batch", self.batch, ">= 1")
    check(self.shard >= 1, "shard", self.shard, ">= 1")
    check(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2^32)")


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedTokens:
  """Captions and the images drawn for them.

  Attributes:
    captions: One per image.
    tokens: Codes [images, cells] in raster order.
    grid: Of the images.
    vocab: Image codes V.
  """

  captions: tuple[str, ...]
  tokens: np.ndarray
  grid: Grid
  vocab: int

  def __len__(self) -> int:
    return len(self.captions)

  def sequences(self, images: np.ndarray) -> np.ndarray:
    """int32 [B, N]: tokens of images with the forced ones in place."""
    forced = np.maximum(self.grid.forced_tokens(self.vocab), 0)
    sequence = np.tile(forced, (len(images), 1))
    sequence[:, self.grid.slot_of.ravel()] = self.tokens[images]
    return sequence


def generate_images(
    teacher: Teacher, captions: Sequence[str], cfg: GenerationConfig,
    folder: str | os.PathLike,
) -> GeneratedTokens:
  """One image per caption, from `folder` as far as it holds them.

  Raises:
    SystemExit: with 0 after SIGTERM; whole files stay, and are not drawn again.
    UserError: when the folder holds images of other captions or settings, or a
      damaged file.
  """
  folder, captions = pathlib.Path(folder), tuple(captions)
  check(len(captions) > 0, "captions", captions, "at least one")
  folder.mkdir(parents=True, exist_ok=True)
  _claim(folder, _manifest(teacher, captions, cfg))
  shards = _shards(folder, len(captions), cfg.shard)
  is_first = jax.process_index() == 0
  bar = Bar(total=len(captions), desc=folder.name, unit="image",
            disable=not is_first)
  # All hosts draw every shard together: none may think another is there.
  is_there = sharding.broadcast_from_host0(
    np.array([path.exists() for path, _ in shards])
  )
  with bar, Preemption() as preemption:
    for (path, images), skip in zip(shards, is_there, strict=True):
      if skip:
        bar.update(len(images))
        continue
      drawn = _draw_images(teacher, captions, images, cfg, preemption, bar)
      if is_first:
        _write_whole(path, drawn)
  sharding.barrier(f"drawn {folder.name}")
  grid = teacher.generator.grid
  tokens = [
    _read(path, (len(images), grid.num_tokens)) for path, images in shards
  ]
  return GeneratedTokens(
      captions, np.concatenate(tokens), grid, teacher.generator.cfg.vocab_out
  )


def batches(
    source: GeneratedTokens, teacher: Teacher, batch: int, seed: int,
    drop_caption: float,
) -> grain.IterDataset:
  """Endless batches {"prompt": Prompt [B], "tokens": int32 [B, N]}.

  Args:
    source: Drawn images.
    teacher: Encodes the captions.
    batch: Examples over all processes.
    seed: Of order and dropping.
    drop_caption: Share of examples shown to the unconditional stream.
  """

  def load(source, index, rng):
    del source
    return {"image": index, "is_dropped": rng.random() < drop_caption}

  def assemble(picked):
    images, is_dropped = picked["image"], picked["is_dropped"]
    texts = [source.captions[i] for i in images]
    both, _ = teacher.encode_prompts(texts, True)
    rows = np.arange(len(texts)) + np.where(is_dropped, len(texts), 0)
    return {
        "prompt": jax.tree.map(lambda x: x[rows], both),
        "tokens": source.sequences(images),
    }

  return data_stream.stream(source, load, batch, seed).map(assemble)


def _manifest(
  teacher: Teacher, captions: tuple[str, ...], cfg: GenerationConfig
):
  """Everything that the drawn tokens depend on."""
  generator, settings = teacher.generator, teacher.sampling
  return {
      "grid": dataclasses.asdict(generator.grid),
      "vocab": generator.cfg.vocab_out,
      "sampling": {
          "guided": teacher.guided,
          **{f.name: np.asarray(getattr(settings, f.name)).item()
             for f in dataclasses.fields(settings)},
      },
      "seed": cfg.seed,
      "shard": cfg.shard,
      "trunk": list(fingerprint(teacher.params["trunk"])),
      "captions": list(captions),
  }


def _claim(folder: pathlib.Path, manifest: dict) -> None:
  """Writes the manifest, or checks that it is the one that is there."""
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
  for name, value in manifest.items():
    same = same_trunk if name == "trunk" else lambda a, b: a == b
    if name not in found or not same(found[name], value):
      raise UserError(
          f"Expected those of this run, got images in {folder} whose {name} "
          "differs. Use another workdir or remove the folder."
      )


def _shards(folder: pathlib.Path, count: int, size: int):
  """[(path, indices of its images)]."""
  starts = range(0, count, size)
  return [
      (folder / f"tokens-{i:05d}-of-{len(starts):05d}.npy",
       np.arange(start, min(start + size, count)))
      for i, start in enumerate(starts)
  ]


def _draw_images(
    teacher, captions, images, cfg: GenerationConfig, preemption: Preemption,
    bar: Bar,
) -> np.ndarray:
  """Codes [images, cells] in the smallest unsigned type that holds them."""
  model, drawn = teacher.generator.model(), []
  batch = sharding.even_batch(cfg.batch, 1 + teacher.guided)
  for start in range(0, len(images), batch):
    if preemption.is_due():
      print("told to stop: files of images that are whole are kept; start "
            "again to continue", file=sys.stderr)
      raise SystemExit(0)
    part = images[start:start + batch]
    # The last batch is filled up: one compile for all.
    index = np.resize(part, batch)
    prompt, _ = teacher.encode_prompts(
        [captions[i] for i in index], teacher.guided
    )
    out = engine.decode(
        model, AR(), teacher.params, sharding.shard_rows(prompt),
        teacher.sampling, jax.random.key(cfg.seed), jnp.asarray(index),
    )
    tokens = sharding.fetch(out.tokens)
    drawn.append(tokens.reshape(batch, -1)[:len(part)])
    bar.update(len(part))
  return np.concatenate(drawn).astype(np.min_scalar_type(model.vocab - 1))


def _write_whole(path: pathlib.Path, tokens: np.ndarray) -> None:
  _replace(path, lambda file: np.save(file, tokens))


def _replace(path: pathlib.Path, write: Callable) -> None:
  """Writes a file atomically; it survives a power cut once it is there."""
  with replacing(path) as partial, open(partial, "wb") as file:
    write(file)
    file.flush()
    os.fsync(file.fileno())


def _read(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray:
  try:
    tokens = np.load(path)
  except ValueError as error:
    raise UserError(
        f"Expected {shape[0]} images, got a damaged {path}. Remove it, it is "
        "drawn again."
    ) from error
  if tokens.shape != shape:
    raise UserError(
        f"Expected {shape}, got {path} of shape {tokens.shape}. Remove it, it "
        "is drawn again."
    )
  return tokens
