"""Search for the decoder settings that are fastest on the available devices.

The best number of queries per pass, of rows and of window tokens depends on the
cost of a pass on these devices and on how many drafts the model accepts. A run
measures both.
"""

from collections.abc import Callable, Sequence
import dataclasses
import statistics

from ssd_jax.core.types import Model
from ssd_jax.decoding import registry
from ssd_jax.pipeline.pipeline import Pipeline

_QUERIES = (8, 16, 24)
_WINDOWS = (2, 4, 8)
_ROUNDS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Passes and time of a decoder.

  Attributes:
    decoder: NAME or NAME:key=value+key=value.
    lossless: Whether the decoder is lossless on this grid.
    queries: Queries of a pass.
    passes: Mean passes of an image.
    seconds: Seconds per image, median over the calls.
    ratio: AR's seconds over the decoder's, median over the calls.
  """

  decoder: str
  lossless: bool
  queries: int
  passes: float
  seconds: float
  ratio: float


def candidates(model: Model, is_trained: bool = True) -> list[str]:
  """Returns the specs of AR and the decoders that are worth a trial.

  Args:
    model: The model.
    is_trained: Whether drafts are meaningful; otherwise only decoders whose
      passes do not depend on the drafts are returned.
  """
  grid, heads = model.grid, all(model.heads)
  windows = [w for w in _WINDOWS if w < grid.cols]
  names = ["ar", *(f"zipar:window={w}" for w in windows)]
  if heads:
    names += [f"ssd:rounds={r}{rest}" for r in _ROUNDS
              for rest in ("", "+schedule=pipelined+lag=1")]
  if not is_trained:
    return names
  for queries in (q for q in _QUERIES if q < grid.length):
    rows = min(1 + -(-queries // grid.row_slots), grid.rows)
    for drafts in ("above", "heads")[:1 + heads]:
      names.append(f"exact:queries={queries}+rows={rows}+drafts={drafts}")
    names.append(f"sjd:window={queries}")
  return names


def run(
    pipe: Pipeline, names: Sequence[str], texts: Sequence[str], batch: int,
    on_ready: Callable[[str], None] = lambda name: None,
) -> list[Measurement]:
  """Generates the prompts with each decoder in turn.

  Args:
    pipe: The model.
    names: Specs of the decoders; the first is AR.
    texts: Prompts; a multiple of `batch`.
    batch: Images generated together.
    on_ready: Called with each decoder once it is compiled.

  Returns:
    Measurements, the fastest decoder first.
  """
  for name in names:
    pipe.generate(texts[:batch], name, batch=batch)
    on_ready(name)
  seconds: dict[str, list[float]] = {name: [] for name in names}
  passes: dict[str, list[int]] = {name: [] for name in names}
  for start in range(0, len(texts), batch):
    for name in names:
      out = pipe.generate(
          texts[start:start + batch], name, batch=batch, first_image=start)
      seconds[name].append(out.seconds / batch)
      passes[name] += out.passes.tolist()
  ar = seconds[names[0]]
  found = [Measurement(
      name, decoder.is_lossless(pipe.model.grid),
      pipe.num_queries(decoder, texts[:batch]), statistics.mean(passes[name]),
      statistics.median(seconds[name]),
      statistics.median(a / b for a, b in zip(ar, seconds[name], strict=True)),
  ) for name, decoder in zip(names, map(registry.parse, names), strict=True)]
  return sorted(found, key=lambda x: -x.ratio)

