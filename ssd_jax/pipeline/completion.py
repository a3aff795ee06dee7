"""Images whose first rows are given.

The given rows become part of the prompt, and the rows below them a grid of
their own. Nothing else changes, so each decoder keeps its promise: a lossless
one samples the rest as AR does after these rows.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Drafter, KVCache, Model, Prompt, Queries
from ssd_jax.decoding.engine import Decoded


@functools.cache
def remainder(model: Model, rows: int) -> Model:
  """Returns the model of the rows below the given ones.

  Args:
    model: Functions of the whole grid.
    rows: Number of given rows.
  """
  whole = model.grid
  grid = Grid(whole.rows - rows, whole.cols, whole.end_of_row)
  given = whole.length - grid.length

  def prefill(params, prompt, scratch):
    return model.prefill(params, prompt, scratch - given)

  drafter = model.drafter and _below(model.drafter, given)
  return dataclasses.replace(
      model, grid=grid, prefill=prefill, drafter=drafter)


def _below(drafter: Drafter, given: int) -> Drafter:
  """Returns the drafter with `given` slots before its first one."""

  def cache(streams: int, scratch: int) -> KVCache:
    return drafter.cache(streams, scratch - given)

  def forward(params, cache, hidden, queries: Queries):
    positions = queries.positions + given
    return drafter.forward(
        params, cache, hidden, queries.replace(positions=positions))

  return dataclasses.replace(drafter, cache=cache, forward=forward)


def extend(
    prompt: Prompt, model: Model, given_BRC: np.ndarray | None
) -> Prompt:
  """Returns prompts that end with the given rows.

  Args:
    prompt: Prompts of B images, and of their unconditional streams.
    model: Functions of the whole grid.
    given_BRC: int32 [B, rows, C], image tokens; None if nothing is given.
  """
  if given_BRC is None:
    return prompt
  batch, rows, cols = given_BRC.shape
  grid = model.grid
  count = rows * grid.row_slots
  forced = np.broadcast_to(grid.forced_tokens(model.vocab)[:count],
                           (batch, count)).copy()
  forced[:, grid.slot_of[:rows].ravel()] = given_BRC.reshape(batch, rows * cols)
  streams = prompt.tokens.shape[0] // batch
  pad = lambda x, value: jnp.pad(
      x, ((0, 0), (0, count), *((0, 0),) * (x.ndim - 2)),
      constant_values=value)
  nothing = jnp.full(prompt.tokens.shape, -1, jnp.int32)
  return prompt.replace(  # type: ignore[attr-defined]
      tokens=pad(prompt.tokens, 0), mask=pad(prompt.mask, True),
      features=None if prompt.features is None else pad(prompt.features, 0),
      given=jnp.concatenate(
          [nothing, jnp.tile(jnp.asarray(forced), (streams, 1))], axis=1))


def join(given_BRC: np.ndarray | None, decoded: Any) -> Any:
  """Returns a `Decoded` of whole grids; the prefill made given rows final."""
  if given_BRC is None:
    return decoded

  def below(rows: np.ndarray, x: Any) -> Any:
    rows = np.broadcast_to(rows, (*x.shape[:-2], *rows.shape[-2:]))
    return np.concatenate([rows, x], axis=-2)

  history = decoded.history
  return Decoded(
      below(given_BRC, decoded.tokens), decoded.passes,
      below(np.ones_like(given_BRC), decoded.commit_pass),
      None if history is None else below(given_BRC[:, None], history))
