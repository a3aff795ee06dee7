"""Which settings of decoders suit the devices at hand, found by running them.

How many queries a pass should feed, on how many rows it should work and how
wide a window should be depends on what a pass of so many queries costs here and
on how many drafts the model accepts. A run measures both.
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
  """What a decoder took.

  Attributes:
    decoder: NAME or NAME:key=value+key=value.
    lossless: Whether it generates by AR's distribution on this grid.
    queries: Of a pass.
    passes: Of an image, mean.
    seconds: Of an image, median over the calls.
    ratio: AR's seconds over these, median over the calls.
  """

  decoder: str
  lossless: bool
  queries: int
  passes: float
  seconds: float
  ratio: float


def candidates(model: Model, is_trained: bool = True) -> list[str]:
  """AR and the decoders that are worth a trial, by their texts.

  Args:
    model: That generates.
    is_trained: Else only those whose passes do not depend on the drafts.
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
  """Generates the texts with each decoder in turn; the fastest comes first.

  Args:
    pipe: The model.
    names: Texts of decoders; the first is AR.
    texts: Prompts; whole batches of them.
    batch: Images generated together.
    on_ready: Called with each decoder once it is compiled.
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

