"""Rows in flight: what is fed, what is seen, what moves along."""

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.rows import queries as row_queries, state as rows_lib
from ssd_jax.decoding.sampling import Sampling
from tests.support import testkit as kit


def context(model):
  """Of the second pass of image 0."""
  return Context(
      jax.random.key(0), jnp.int32(0), jax.random.key(2), {}, Sampling.make(),
      model
  )


def drafted(model, rows):
  """The state after the prefill, with `rows` rows drafted."""
  state = rows_lib.start(
      context(model), jnp.ones(model.vocab) / model.vocab, jnp.ones((1, 1)),
      rows, model.grid.cols,
  )
  slots = model.grid.slot_of[:rows].ravel()
  return state.replace(
      known=state.known.at[slots].set(True), entered=jnp.int32(rows)
  )


def queries_of(
    model, state, needed=row_queries.whole_rows, size=None, **kwargs
):
  """The queries of a pass; enough of them by default."""
  return row_queries.propose(
      context(model), state, needed(model.grid, state),
      size or model.grid.length, **kwargs
  )


def fed(*args, **kwargs):
  """{slot fed: slots it sees}."""
  queries = queries_of(*args, **kwargs)
  return {
      int(slot): set(np.flatnonzero(seen).tolist())
      for slot, seen in zip(queries.slots, queries.visible)
      if slot < args[0].grid.length
  }


def test_what_predicts_nothing_open_is_left_out():
  """A final token is fed once, and again while the next token is open."""
  model = kit.chain(3, 4)
  state = drafted(model, 2)
  state = state.replace(
      final=state.final.at[:3].set(True), settled=state.settled.at[:2].set(True)
  )
  assert list(fed(model, state, row_queries.open_rows)) == [2, 3, 4, 5, 6]
  assert list(fed(model, state)) == [0, 1, 2, 3, 4, 5, 6]
  assert list(fed(model, state, row_queries.open_rows, size=3)) == [2, 3, 4]


def test_the_frontier_of_rows():
  """The last final token of each row, its next ones, and what was not fed."""
  model = kit.chain(3, 4, True)  # slots 0 1 2 3 | 4 forced | 5 ...
  state = drafted(model, 2)
  state = state.replace(
      final=state.final.at[jnp.arange(3)].set(True),
      settled=state.settled.at[jnp.array([1])].set(True),
  )
  needed = lambda grid, state: row_queries.frontier(
      grid, state, jnp.array([1, 3, 0])
  )
  assert list(fed(model, state, needed)) == [0, 2, 4, 5, 6]


def test_what_was_never_fed_is_not_seen():
  """Only fed slots before a query are visible, itself included."""
  model = kit.chain(3, 3)
  state = drafted(model, 3)
  state = state.replace(known=state.known.at[4].set(False))
  assert fed(model, state)[5] == {0, 1, 2, 3, 5}
  state = state.replace(written=state.written.at[4].set(True))
  assert fed(model, state)[5] == {0, 1, 2, 3, 4, 5}


def test_row_causal_hides_drafts_of_other_rows():
  """A query sees final tokens, its own row and the slot before it."""
  model = kit.chain(3, 3)
  seen = fed(model, drafted(model, 2), row_causal=True)
  assert seen[1] == {0, 1}
  assert seen[2] == {0, 2}  # it predicts row 1
  assert seen[4] == {0, 2, 3, 4}
