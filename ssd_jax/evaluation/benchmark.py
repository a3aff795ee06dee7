"""Runs of decoders over the same prompts, interleaved, measured and stored.

Every decoder generates a batch of prompts before the next batch begins, in an
order that rotates from batch to batch, so that a slow minute affects all alike.
Each batch of a decoder is stored; an interrupted run continues from what is
stored.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import time

import jax
import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding import registry
from ssd_jax.decoding.sampling import Overrides
from ssd_jax.evaluation import run_store
from ssd_jax.evaluation.run_store import Run
from ssd_jax.pipeline.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Entry:
  """A decoder of a comparison.

  Attributes:
    label: The decoder as it was asked for.
    decoder: Its settings.
    seed: The seed of its run.
  """

  label: str
  decoder: Decoder
  seed: int


@dataclasses.dataclass(frozen=True)
class Job:
  """What every decoder of a comparison generates.

  Attributes:
    prompts: Texts, in order.
    num_images: Images per prompt.
    batch: Images decoded together.
    sampling: guidance, temperature, top_k, top_p; None for the model's.
  """

  prompts: tuple[str, ...]
  num_images: int = 1
  batch: int = 1
  sampling: Overrides = dataclasses.field(default_factory=Overrides)

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


def parse_entries(
    text: str, seed: int, known: Mapping[str, type] = registry.DECODERS
) -> list[Entry]:
  """Parses decoders such as "ar,ssd:rounds=1+vertical=2,ar:seed=1".

  Args:
    text: Decoders separated by commas; `seed=` is the run's.
    seed: The seed of decoders without `seed=`.
    known: Classes by name.

  Raises:
    UserError: on an invalid decoder, or one that is named twice.
  """
  check(0 <= seed < 2**32, "seed", seed, "in [0, 2^32)")
  entries: list[Entry] = []
  for label in (part.strip() for part in text.split(",")):
    name, _, rest = label.partition(":")
    own, settings = seed, []
    for part in filter(None, rest.split("+")):
      if part.startswith("seed="):
        own = _seed(part)
      else:
        settings.append(part)
    decoder = registry.parse(f"{name}:{'+'.join(settings)}", known)
    entry = Entry(label, decoder, own)
    if any((e.decoder, e.seed) == (decoder, own) for e in entries):
      raise UserError(
          f"Expected each decoder once, got {label!r} twice. Remove one or "
          "give it a seed of its own, such as ar:seed=1.")
    entries.append(entry)
  return entries


def _seed(part: str) -> int:
  value = part.removeprefix("seed=")
  if not value.isdecimal() or int(value) >= 2**32:
    raise UserError(f"Expected a number in [0, 2^32), got {part}.")
  return int(value)


def run(
    pipe: Pipeline, entries: Sequence[Entry], job: Job, folder: pathlib.Path,
    on_step: Callable[[str, int], None] = lambda label, images: None,
) -> list[Run]:
  """Runs each entry over the job; finished batches are read from `folder`.

  Args:
    pipe: The model.
    entries: Decoders.
    job: What they generate.
    folder: The store of finished batches.
    on_step: Called with an entry's label and the number of images it has just
      finished; with 0 before it compiles.
  """
  paths = _paths(pipe, entries, job, folder)
  is_warm = set()
  for turn, start in enumerate(job.starts):
    for place in range(len(entries)):
      index = (place + turn) % len(entries)
      entry, path = entries[index], paths[index][turn]
      size = min(job.batch, len(job.texts) - start)
      if not run_store.is_whole(path):
        if entry.decoder not in is_warm:
          on_step(entry.label, 0)
          _generate(pipe, entry, job, start)
          is_warm.add(entry.decoder)
        run_store.write(path, measure(pipe, entry, job, start))
      on_step(entry.label, size)
  return [run_store.collect(row) for row in paths]


def _paths(
    pipe: Pipeline, entries: Sequence[Entry], job: Job, folder: pathlib.Path
) -> list[list[pathlib.Path]]:
  """Returns the file of each entry and batch."""
  weights = run_store.fingerprint((pipe.params, pipe.vq_params))
  settings, _ = pipe.sampling(**job.sampling)
  resolved = [float(x) for x in jax.tree.leaves(settings)]
  names = [
      f"{start:06d}-{run_store.digest(job.texts[start:start + job.batch])}.npz"
      for start in job.starts]
  return [[
      folder / run_store.key(weights, pipe, entry.decoder, dict(
          seed=entry.seed, batch=job.batch, sampling=resolved)) / name
      for name in names] for entry in entries]


def _generate(pipe: Pipeline, entry: Entry, job: Job, start: int):
  """Returns (texts, output) of a batch; the last batch is padded."""
  texts = job.texts[start:start + job.batch]
  # A smaller last batch would compile again and take another time.
  texts += [texts[-1]] * (job.batch - len(texts))
  return texts, pipe.generate(
      texts, entry.decoder, seed=entry.seed, batch=job.batch,
      first_image=start, **job.sampling)


_SESSION = time.time_ns()  # identifies this process


def measure(pipe: Pipeline, entry: Entry, job: Job, start: int) -> Run:
  """Runs an entry over the batch that begins with image `start`."""
  texts, out = _generate(pipe, entry, job, start)
  size = min(job.batch, len(job.texts) - start)
  nll, entropy = pipe.nll(
      out.tokens, texts, batch=min(job.batch, 4), **job.sampling)
  memory = pipe.programs.peak_bytes(entry.decoder)
  return Run(
      out.tokens[:size], out.passes[:size], out.commit_pass[:size],
      np.full(size, out.seconds / job.batch),
      nll[:size].mean((1, 2), np.float64),
      entropy[:size].mean((1, 2), np.float64),
      np.full(size, -1 if memory is None else memory),
      np.full(size, _SESSION),
      out.images[:size],
  )


@dataclasses.dataclass(frozen=True)
class Traits:
  """Static properties of a decoder on a model.

  Attributes:
    queries: Slots that a pass feeds for one image, idle ones included.
    is_lossless: Whether it claims to be lossless on the model's grid.
  """

  queries: int
  is_lossless: bool


def traits(pipe: Pipeline, decoder: Decoder, job: Job) -> Traits:
  """Returns the traits of a decoder; checks what it needs of the model."""
  queries = pipe.num_queries(decoder, job.prompts[:1], **job.sampling)
  return Traits(
      queries, decoder.is_lossless(pipe.model.grid))
