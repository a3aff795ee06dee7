"""What CASCADE takes for granted, measured: is a model's output redundant?

Hidden states are the trunk's before the final norm, of the conditional stream,
at the slot that was fed: those that decoding compares.

  E alternatives at a slot, the model's likeliest   U, W offsets up and down
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.types import KVCache, Model, Prompt, Queries
from ssd_jax.decoding import sampling as sampling_lib
from ssd_jax.decoding.sampling import Overrides
from ssd_jax.pipeline.pipeline import Pipeline

ALTERNATIVES = 8
THRESHOLDS = tuple(np.round(np.arange(0.5, 1.0, 0.05), 2)) + (0.98, 0.99)
_REACH = 8  # tokens to each side
_SIDE = 256  # slots of the map of one image


@dataclasses.dataclass(frozen=True)
class Evidence:
  """Cosines of hidden states, and entropies in nats.

  Attributes:
    equal_UW: Mean cosine of two tokens that hold the same code, U rows and
      W - reach columns apart; nan where there is no such pair.
    different_UW: The same of tokens that hold different codes.
    slots_MM: Between the first slots of the first image.
    siblings_E: Mean cosine of each alternative at a slot with the likeliest.
    parents_E: Mean cosine of each alternative with the slot before it.
    alike_T: Share of the pairs of alternatives at each threshold or above.
    converged_T: Share of the alternatives whose cosine with the slot before
      is at each threshold or above.
    entropy_RC: Mean of the predictions for each token.
    entropies: Of every token of every image.
  """

  equal_UW: np.ndarray
  different_UW: np.ndarray
  slots_MM: np.ndarray
  siblings_E: np.ndarray
  parents_E: np.ndarray
  alike_T: np.ndarray
  converged_T: np.ndarray
  entropy_RC: np.ndarray
  entropies: np.ndarray


def collect(
    pipe: Pipeline, tokens_BRC: np.ndarray, prompts: Sequence[str],
    batch: int = 4, on_batch: Callable[[int], None] = lambda count: None,
    **sampling: Unpack[Overrides],
) -> Evidence:
  """What images that the model generated say.

  Args:
    pipe: The model.
    tokens_BRC: Codes of the images.
    prompts: One per image.
    batch: Images looked at together.
    on_batch: Called with the number of images finished.
    **sampling: As for `Pipeline.generate`.
  """
  settings, guided = pipe.sampling(**sampling)
  look = make_look(pipe.family.generator.model())
  states: list[np.ndarray] = []
  siblings: list[np.ndarray] = []
  parents: list[np.ndarray] = []
  for start in range(0, len(tokens_BRC), batch):
    part = np.arange(start, start + batch).clip(max=len(tokens_BRC) - 1)
    prompt, _ = pipe.family.encode_prompts([prompts[i] for i in part], guided)
    found = look(pipe.params, prompt, pipe.sequence(tokens_BRC[part]), settings)
    count = min(batch, len(tokens_BRC) - start)
    for rows, x in zip((states, siblings, parents), found, strict=True):
      rows.append(np.asarray(x)[:count])
    on_batch(count)
  states_BND = np.concatenate(states)
  cosine_XEE = np.concatenate(siblings).reshape(-1, *siblings[0].shape[2:])
  parent_XE = np.concatenate(parents).reshape(-1, parents[0].shape[-1])
  _, entropy = pipe.nll(tokens_BRC, prompts, batch, **sampling)
  slots = pipe.model.grid.slot_of
  equal, different = by_offset(states_BND[:, slots], np.asarray(tokens_BRC))
  upper = cosine_XEE[:, *np.triu_indices(cosine_XEE.shape[-1], 1)]
  at_least = lambda x: np.array([np.mean(x >= t) for t in THRESHOLDS])
  first = states_BND[0, :_SIDE]
  return Evidence(
      equal, different, first @ first.T, cosine_XEE[:, 0].mean(0),
      parent_XE.mean(0), at_least(upper), at_least(parent_XE),
      entropy.mean(0), entropy.ravel())


def make_look(model: Model):
  """Jitted (params, prompt, sequence [B, N], sampling) -> what is at hand.

  (states [B, N, D] of length one; cosines [B, M, E, E] between the states of
  alternatives at each of M tokens; cosines [B, M, E] with the slot before.)
  Alternatives are fed as decoding feeds the children of a tree's node.
  """
  grid, width = model.grid, min(ALTERNATIVES, model.vocab)
  cells = np.flatnonzero(~grid.is_forced)[1:]  # with a slot before
  rows = np.array_split(cells, -(-len(cells) // max(grid.cols, 1)))
  most = max(map(len, rows))
  chunks_XM = np.stack([np.resize(row, most) for row in rows])
  # A chunk that is padded repeats its first tokens; they are left out again.
  kept = np.concatenate([np.arange(most) < len(row) for row in rows])

  @jax.jit
  def look(params, prompt: Prompt, sequence_BN, settings):
    batch = len(sequence_BN)
    streams = len(prompt.tokens) // batch
    hidden, cache = _read(
        model, params, prompt, jnp.tile(sequence_BN, (streams, 1)),
        most * width)
    before_GBND = jnp.stack(jnp.split(hidden[:, :-1], streams))
    states_BND = _unit(hidden[:batch, 1:])

    def try_cells(slots_M):
      logits = model.logits(params, before_GBND[:, :, slots_M])
      p_BMV = sampling_lib.target(logits, settings)
      tokens_BME = jax.lax.top_k(p_BMV, width)[1]
      queries = _alternatives(grid.length, slots_M, tokens_BME)
      stacked = jax.tree.map(lambda x: jnp.concatenate([x] * streams), queries)
      hidden, _ = model.forward(params, cache, prompt, stacked)
      x_BMED = _unit(hidden[:batch]).reshape(*tokens_BME.shape, -1)
      return (jnp.einsum("bmed,bmfd->bmef", x_BMED, x_BMED),
              jnp.einsum("bmed,bmd->bme", x_BMED, states_BND[:, slots_M - 1]))

    found = jax.lax.map(try_cells, jnp.asarray(chunks_XM))
    merge = lambda x: jnp.moveaxis(x, 1, 0).reshape(
        batch, -1, *x.shape[3:])[:, kept]
    return states_BND, *map(merge, found)

  return look


def _read(
    model: Model, params, prompt: Prompt, sequence_SN: jax.Array, scratch: int
) -> tuple[jax.Array, KVCache]:
  """(states [S, N + 1, D] of the prompt's end and of every slot, cache)."""
  rows, length = sequence_SN.shape
  first_SD, cache = model.prefill(params, prompt, scratch)
  slots = jnp.broadcast_to(jnp.arange(length), (rows, length))
  visible = jnp.tril(jnp.ones((length, length + scratch), bool))
  hidden, cache = model.forward(params, cache, prompt, Queries(
      sequence_SN, slots, slots,
      jnp.broadcast_to(visible, (rows, *visible.shape))))
  return jnp.concatenate([first_SD[:, None], hidden], axis=1), cache


def _alternatives(
    length: int, slots_M: jax.Array, tokens_BME: jax.Array
) -> Queries:
  """Queries [B, M * E] that see what is before their token, and themselves."""
  batch, _, width = tokens_BME.shape
  places_Q = jnp.repeat(slots_M, width)
  own_Q = length + jnp.arange(len(places_Q))
  every = jnp.arange(length + len(places_Q))
  visible_QX = (every < places_Q[:, None]) | (every == own_Q[:, None])
  over = lambda x: jnp.broadcast_to(x, (batch, *x.shape))
  return Queries(tokens_BME.reshape(batch, -1), over(places_Q), over(own_Q),
                 over(visible_QX))


def by_offset(
    states_BRCD: np.ndarray, tokens_BRC: np.ndarray, reach: int = _REACH
) -> tuple[np.ndarray, np.ndarray]:
  """Mean cosines [U, W] of tokens with equal codes, and with different ones.

  Args:
    states_BRCD: Of length one.
    tokens_BRC: Their codes.
    reach: Largest distance; W = 2 * reach + 1.
  """
  rows, cols = tokens_BRC.shape[1:]
  means = np.full((2, reach + 1, 2 * reach + 1), np.nan)
  for down in range(min(reach, rows - 1) + 1):
    for right in range(-min(reach, cols - 1), min(reach, cols - 1) + 1):
      here = np.s_[:, :rows - down, max(0, -right):cols - max(0, right)]
      there = np.s_[:, down:, max(0, right):cols + min(0, right)]
      cosine = np.einsum(
          "brcd,brcd->brc", states_BRCD[here], states_BRCD[there])
      is_equal = tokens_BRC[here] == tokens_BRC[there]
      for mean, chosen in zip(means, (is_equal, ~is_equal), strict=True):
        if chosen.any():
          mean[down, right + reach] = cosine[chosen].mean()
  return means[0], means[1]


def _unit(x: jax.Array) -> jax.Array:
  """float32 vectors of length one."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
