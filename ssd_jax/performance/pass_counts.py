"""Pass counts of decoders whose passes do not depend on the image."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from ssd_jax.core.protocols import Decoder
from ssd_jax.core.types import Model, Prompt
from ssd_jax.decoding import engine
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.sampling import Sampling

# AR's passes over those of lossless decoders: the embedded model, temperature
# 1, guidance 1.25 (docs/results.md). Other models differ.
_REDUCTIONS = {"exact": 256 / 63.3, "continuation": 256 / 70.4,
               "coupled": 256 / 71.9, "sjd": 256 / 79.4}


def of_rows(
    rounds: int, model: Model
) -> list[tuple[str, int, int]]:
  """Returns (decoder, passes, queries) of SSD's schedules with `rounds`.

  Rows enter every `lag` passes, or in blocks that are corrected together.
  Source: SSD, arXiv:2606.20543, section 3.3.
  """
  grid = model.grid
  start = 1 + 2 * -(-(grid.cols - 1) // 5)
  found, below = [], grid.rows - 1
  for lag in range(1, rounds + 2):
    rows = min(-(-(rounds + 1) // lag), grid.rows)
    found.append((
        f"ssd:rounds={rounds}+schedule=pipelined+lag={lag}",
        start + lag * below + rounds + 1 - lag, rows * grid.row_slots))
  for block in range(2, min(model.heads[1], below) + 1):
    whole, rest = divmod(below, block)
    passes = start + whole * (rounds + block) + (rest and rounds + rest)
    found.append((f"ssd:rounds={rounds}+vertical={block}", passes,
                  block * grid.row_slots))
  return found


def of_ar(model: Model) -> int:
  """Returns the passes of an image with AR."""
  return cast(int, fixed_passes(AR(), model))


def assumed(decoder: Decoder, model: Model) -> float:
  """Returns AR's passes over the decoder's reduction on the embedded model.

  They are AR's own for a decoder that was not measured there.
  """
  return round(of_ar(model) / _REDUCTIONS.get(decoder.name, 1.0), 1)


def fixed_passes(decoder: Decoder, model: Model) -> int | None:
  """Returns the passes of an image, or None if they depend on the image.

  The passes are counted by generating an image with a tiny network.
  """
  if not decoder.has_fixed_passes:
    return None
  logits = lambda params, hidden: jnp.concatenate([hidden, -hidden], -1)
  empty: Any = None  # no keys and values
  feed = lambda tokens: jnp.sin(1.7 * tokens)[..., None]
  small = Model(
      model.grid, 2, lambda params, prompt, scratch: (
          jnp.ones((len(prompt.tokens), 1)), empty),
      lambda params, cache, prompt, queries: (feed(queries.tokens), cache),
      logits, lambda params, tokens: feed(tokens),
      lambda params, direction, offset, hidden, tokens: logits(
          params, hidden), (max(model.heads[0], 5), max(model.heads[1], 5)))
  prompt = Prompt(
      jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool),
      jnp.zeros((1, 1 + model.grid.length), jnp.int32))
  out = engine.decode(small, decoder, {}, prompt, Sampling.make(),
                      jax.random.key(0), jnp.arange(1))
  return int(out.passes[0])
