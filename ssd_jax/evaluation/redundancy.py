"""Redundancy of a model's hidden states, the premise of CASCADE.

Hidden states are the trunk's states before the final norm, of the conditional
stream, at the slot that was fed; decoding compares the same states.

  E likeliest alternatives at a slot   U, W vertical and horizontal offsets
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
_REACH = 8  # largest offset in tokens
_SIDE = 256  # slots of the similarity map of one image


@dataclasses.dataclass(frozen=True)
class Evidence:
  """Cosines of hidden states, and entropies in nats.

  Attributes:
    equal_UW: Mean cosine of two grid positions with equal tokens, U rows and
      W - reach columns apart; nan if there is no such pair.
    different_UW: Mean cosine of grid positions with different tokens.
    slots_MM: Cosines between the first slots of the first image.
    siblings_E: Mean cosine of each alternative at a slot with the likeliest.
    parents_E: Mean cosine of each alternative with the previous slot.
    alike_T: Share of pairs of alternatives whose cosine reaches each threshold.
    converged_T: Share of alternatives whose cosine with the previous slot
      reaches each threshold.
    entropy_RC: Mean entropy of the predictions at each grid position.
    entropies: Entropy of every prediction of every image.
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
  """Measures the redundancy of images that the model generated.

  Args:
    pipe: The model.
    tokens_BRC: [B, R, C], tokens of the images.
    prompts: One prompt per image.
    batch: Images measured together.
    on_batch: Called with the number of images finished since the last call.
    **sampling: Sampling settings of `Pipeline.generate`.
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
  """Returns a jitted (params, prompt, sequence [B, N], sampling) -> cosines.

  The result is (states [B, N, D] of unit length; cosines [B, M, E, E] between
  the states of alternatives at each of M slots; cosines [B, M, E] of the
  alternatives with the previous slot). Alternatives are fed as decoding feeds
  the children of a tree's node.
  """
  grid, width = model.grid, min(ALTERNATIVES, model.vocab)
  slots = np.flatnonzero(~grid.is_forced)[1:]  # those with a previous slot
  rows = np.array_split(slots, -(-len(slots) // max(grid.cols, 1)))
  most = max(map(len, rows))
  chunks_XM = np.stack([np.resize(row, most) for row in rows])
  # A padded chunk repeats its first slots, which are dropped again.
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

    def compare(slots_M):
      logits = model.logits(params, before_GBND[:, :, slots_M])
      p_BMV = sampling_lib.target(logits, settings)
      tokens_BME = jax.lax.top_k(p_BMV, width)[1]
      queries = _alternatives(grid.length, slots_M, tokens_BME)
      stacked = jax.tree.map(lambda x: jnp.concatenate([x] * streams), queries)
      hidden, _ = model.forward(params, cache, prompt, stacked)
      x_BMED = _unit(hidden[:batch]).reshape(*tokens_BME.shape, -1)
      return (jnp.einsum("bmed,bmfd->bmef", x_BMED, x_BMED),
              jnp.einsum("bmed,bmd->bme", x_BMED, states_BND[:, slots_M - 1]))

    found = jax.lax.map(compare, jnp.asarray(chunks_XM))
    merge = lambda x: jnp.moveaxis(x, 1, 0).reshape(
        batch, -1, *x.shape[3:])[:, kept]
    return states_BND, *map(merge, found)

  return look


def _read(
    model: Model, params, prompt: Prompt, sequence_SN: jax.Array, scratch: int
) -> tuple[jax.Array, KVCache]:
  """Returns (states [S, N + 1, D] of the prompt's end and all slots, cache)."""
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
  """Returns queries [B, M * E] that attend to earlier slots and themselves."""
  batch, _, width = tokens_BME.shape
  slots_Q = jnp.repeat(slots_M, width)
  own_Q = length + jnp.arange(len(slots_Q))
  every = jnp.arange(length + len(slots_Q))
  visible_QX = (every < slots_Q[:, None]) | (every == own_Q[:, None])
  over = lambda x: jnp.broadcast_to(x, (batch, *x.shape))
  return Queries(tokens_BME.reshape(batch, -1), over(slots_Q), over(own_Q),
                 over(visible_QX))


def by_offset(
    states_BRCD: np.ndarray, tokens_BRC: np.ndarray, reach: int = _REACH
) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean cosines [U, W] of positions with equal and different tokens.

  Args:
    states_BRCD: [B, R, C, D], states of unit length.
    tokens_BRC: [B, R, C], tokens.
    reach: Largest offset; W = 2 * reach + 1.
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
  """Returns x as float32 vectors of unit length."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
