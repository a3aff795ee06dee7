"""Runs of decoders over the same prompts, interleaved, measured and kept.

Every decoder draws a batch of prompts before the next batch begins, in an order
that turns from batch to batch, so that a slow minute hits all alike. What a
decoder drew of a batch is kept in a shard; an interrupted run goes on from its
shards, and a shard is used again only where nothing that could change it did.

N images, ordered by prompt; R rows and C columns of the grid; H, W pixels.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.config import UserError, check
from ssd_jax.decoding import by_name, engine
from ssd_jax.pipeline import Pipeline

_SHARD_VERSION = 1  # raise it when shards hold something else


@dataclasses.dataclass(frozen=True)
class Entry:
  """A decoder of a comparison.

  Attributes:
    label: As it was asked for.
    decoder: Its settings.
    seed: Of its runs.
  """

  label: str
  decoder: engine.Decoder
  seed: int


@dataclasses.dataclass(frozen=True)
class Job:
  """What every decoder of a comparison draws.

  Attributes:
    prompts: In order.
    num_images: Per prompt.
    batch: Pictures drawn together.
    sampling: guidance, temperature, top_k, top_p; None for the model's.
  """

  prompts: tuple[str, ...]
  num_images: int = 1
  batch: int = 1
  sampling: tuple[tuple[str, float | None], ...] = ()

  def __post_init__(self):
    check(len(self.prompts) >= 1, "num_prompts", len(self.prompts), ">= 1")
    check(self.num_images >= 1, "num_images", self.num_images, ">= 1")
    check(self.batch >= 1, "batch", self.batch, ">= 1")

  @property
  def texts(self) -> list[str]:
    """The prompt of each image."""
    return [p for p in self.prompts for _ in range(self.num_images)]

  @property
  def starts(self) -> range:
    """The first image of each batch."""
    return range(0, len(self.texts), self.batch)


@dataclasses.dataclass(frozen=True)
class Run:
  """What a decoder drew, and at what cost.

  Attributes:
    images: uint8 [N, H, W, 3].
    tokens: int32 [N, R, C].
    passes: int32 [N].
    commit_pass: int32 [N, R, C].
    seconds: float64 [N], of the image's batch over its size, compiling not
      counted.
    nll: float64 [N], mean surprisal of the model, in nats per cell.
    entropy: float64 [N], mean entropy of the model's predictions.
    memory: int64 [N], bytes of the program at its peak; -1 if not known.
  """

  images: np.ndarray
  tokens: np.ndarray
  passes: np.ndarray
  commit_pass: np.ndarray
  seconds: np.ndarray
  nll: np.ndarray
  entropy: np.ndarray
  memory: np.ndarray


def parse_entries(text: str, seed: int) -> list[Entry]:
  """The decoders of "ar,ssd:rounds=1+lag=1,ar:seed=1".

  `seed=` is the run's: a decoder without it has `seed`.

  Raises:
    UserError: on a decoder that cannot be or is named twice.
  """
  check(0 <= seed < 2**32, "seed", seed, "in [0, 2^32)")
  entries = []
  for label in (part.strip() for part in text.split(",")):
    name, _, rest = label.partition(":")
    own, settings = seed, []
    for part in filter(None, rest.split("+")):
      if part.startswith("seed="):
        own = _seed(part)
      else:
        settings.append(part)
    decoder = by_name.parse(f"{name}:{'+'.join(settings)}")
    entry = Entry(label, decoder, own)
    if any((e.decoder, e.seed) == (decoder, own) for e in entries):
      raise UserError(
          f"got decoder {label!r} twice, expected each once; remove one or "
          "give it a seed of its own, such as ar:seed=1")
    entries.append(entry)
  return entries


def _seed(part: str) -> int:
  value = part.removeprefix("seed=")
  if not value.isdecimal() or int(value) >= 2**32:
    raise UserError(f"got {part}, expected a number in [0, 2^32); correct it")
  return int(value)


def run(
    pipe: Pipeline, entries: Sequence[Entry], job: Job, folder: pathlib.Path,
    on_step: Callable[[str, int], None] = lambda label, images: None,
) -> list[Run]:
  """What each entry draws for the job; finished batches come from `folder`.

  Args:
    pipe: Of all entries.
    entries: Decoders.
    job: What they draw.
    folder: Of the shards.
    on_step: Called with an entry's label and the number of images it has just
      finished; with 0 before it compiles.
  """
  weights = fingerprint((pipe.params, pipe.vq_params))
  paths = [[folder / _key(weights, entry, job) / name
            for name in _shard_names(job)] for entry in entries]
  is_warm = set()
  for turn, start in enumerate(job.starts):
    for place in range(len(entries)):
      index = (place + turn) % len(entries)
      entry, path = entries[index], paths[index][turn]
      size = min(job.batch, len(job.texts) - start)
      if _read_shard(path) is None:
        if entry.decoder not in is_warm:
          on_step(entry.label, 0)
          _draw(pipe, entry, job, start)
          is_warm.add(entry.decoder)
        _write_shard(path, measure(pipe, entry, job, start))
      on_step(entry.label, size)
  return [_collect(row) for row in paths]


def _draw(pipe: Pipeline, entry: Entry, job: Job, start: int):
  """(texts of the batch, its output); the last batch is filled up."""
  texts = job.texts[start:start + job.batch]
  # Smaller last batches would compile anew and weigh otherwise.
  texts += [texts[-1]] * (job.batch - len(texts))
  return texts, pipe.generate(
      texts, entry.decoder, seed=entry.seed, batch=job.batch,
      first_image=start, **dict(job.sampling))


def measure(pipe: Pipeline, entry: Entry, job: Job, start: int) -> Run:
  """What an entry draws of the batch that begins with image `start`."""
  texts, out = _draw(pipe, entry, job, start)
  size = min(job.batch, len(job.texts) - start)
  nll, entropy = pipe.nll(
      out.tokens, texts, batch=min(job.batch, 4), **dict(job.sampling))
  memory = pipe.program_bytes(entry.decoder)
  return Run(
      out.images[:size], out.tokens[:size], out.passes[:size],
      out.commit_pass[:size], np.full(size, out.seconds / job.batch),
      nll[:size].mean((1, 2), np.float64),
      entropy[:size].mean((1, 2), np.float64),
      np.full(size, -1 if memory is None else memory),
  )


def count_queries(pipe: Pipeline, decoder: engine.Decoder, job: Job) -> int:
  """Slots that a pass feeds for one image, idle ones included.

  Found by tracing one image: nothing is computed, but what a decoder demands of
  the model is checked.
  """
  counts = []

  def forward(params, cache, prompt, queries):
    counts.append(queries.tokens.shape[-1])
    return pipe.model.forward(params, cache, prompt, queries)

  model = dataclasses.replace(pipe.model, forward=forward)
  settings, guided = pipe.sampling(**dict(job.sampling))
  prompt, _ = pipe.family.encode_prompts(list(job.prompts[:1]), guided)
  jax.eval_shape(
      lambda params, prompt: engine.decode(
          model, decoder, params, prompt, settings, jax.random.key(0),
          jnp.arange(1)),
      pipe.params_for(decoder), prompt)
  return max(counts)


def fingerprint(tree: Any) -> str:
  """A checksum of all arrays of a tree and of their names."""
  digest = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    array = np.ascontiguousarray(leaf)
    name = f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}"
    digest.update(name.encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _key(weights: str, entry: Entry, job: Job) -> str:
  """Names all that a shard depends on beside its prompts, the machine too."""
  device = jax.devices()[0]
  return _digest(dict(
      version=_SHARD_VERSION, weights=weights, decoder=repr(entry.decoder),
      seed=entry.seed, batch=job.batch, sampling=job.sampling,
      jax=jax.__version__, device=f"{device.platform} {device.device_kind}"))


def _shard_names(job: Job) -> list[str]:
  """A file name per batch, from its place and its prompts."""
  return [
      f"{start:06d}-{_digest(job.texts[start:start + job.batch])}.npz"
      for start in job.starts]


def _digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_shard(path: pathlib.Path, run: Run) -> None:
  """Writes a checksum and the arrays, by one rename."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **dataclasses.asdict(run))
  blob = buffer.getvalue()
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  partial.write_bytes(hashlib.sha256(blob).digest() + blob)
  os.replace(partial, path)


def _read_shard(path: pathlib.Path) -> Run | None:
  """The run that `_write_shard` wrote, None if missing or damaged."""
  blob = path.read_bytes() if path.is_file() else b""
  if hashlib.sha256(blob[32:]).digest() != blob[:32]:
    return None
  with np.load(io.BytesIO(blob[32:])) as arrays:
    return Run(**arrays)


def _collect(paths: Sequence[pathlib.Path]) -> Run:
  """The shards of an entry as one."""
  shards = [_read_shard(path) for path in paths]
  names = [field.name for field in dataclasses.fields(Run)]
  return Run(**{
      name: np.concatenate([getattr(shard, name) for shard in shards])
      for name in names})
