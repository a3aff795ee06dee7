"""The state of rows in flight: drafts verified, committed, moved along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
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


@pytest.mark.parametrize("end_of_row", [False, True])
def test_rows_in_flight_predict_each_token_once(end_of_row):
  """R x row slots queries predict every open token of R rows."""
  model = kit.chain(5, 4, end_of_row)
  state = drafted(model, 3)
  queries = queries_of(model, state, size=3 * model.grid.row_slots)
  p = jnp.full((len(queries.slots), model.vocab), 0.5)
  verdict = rows_lib.verify(context(model), state, queries.slots, p)
  cells = np.asarray(verdict.slots)[np.asarray(verdict.is_open)]
  np.testing.assert_array_equal(cells, model.grid.slot_of[:3].ravel()[1:])


def test_the_distributions_move_with_their_tokens():
  """A token keeps its q when the window begins elsewhere."""
  model = kit.chain(5, 3)
  state = drafted(model, 2)
  state = state.replace(q=jnp.arange(6.0)[:, None] * jnp.ones(model.vocab))
  moved = rows_lib.shift_window(state, jnp.int32(1), state.first)
  np.testing.assert_array_equal(moved.q[:, 0], [3, 4, 5, 0, 0, 0])
  shifted = rows_lib.shift_window(state, jnp.int32(0), state.first + 1)
  np.testing.assert_array_equal(shifted.q[:, 0], [1, 2, 0, 4, 5, 0])
  for row, col in ((0, 1), (1, 2)):
    index = rows_lib.window_index(state, jnp.int32(row), jnp.int32(col))
    assert index == 3 * row + col


def test_a_token_is_settled_once_it_was_fed():
  """A draft that passed has been fed, one that was resampled has not."""
  model = kit.chain(2, 3, vocab=4)
  state = drafted(model, 1)
  state = state.replace(q=jnp.full_like(state.q, 0.25))
  queries = queries_of(model, state)
  p = jnp.full((len(queries.slots), 4), 0.25).at[1].set(jnp.eye(4)[3])
  verdict = rows_lib.verify(context(model), state, queries.slots, p)
  state = rows_lib.commit(
      state, queries, verdict, verdict.had_draft, verdict.had_draft
  )
  assert state.final[:3].all()
  np.testing.assert_array_equal(state.settled[:3], [True, True, False])
  np.testing.assert_array_equal(state.q[2], jnp.eye(4)[3])


def test_the_first_test_of_a_draft_is_strict():
  """Leniency is for what a pass has kept or generated, not for first drafts."""
  model = kit.chain(2, 40, vocab=4)
  state = drafted(model, 1)
  state = state.replace(q=jnp.full_like(state.q, 0.25))
  queries = queries_of(model, state)
  p = jnp.full((len(queries.slots), 4), 0.25).at[:, 0].set(0.1)
  judge = lambda state, lenience: rows_lib.verify(
      context(model), state, queries.slots, p, lenience=lenience)
  strict, first = judge(state, 1.0), judge(state, 0.3)
  np.testing.assert_array_equal(first.accepted, strict.accepted)
  np.testing.assert_allclose(first.distribution, p, atol=1e-6)
  state = rows_lib.commit(
      state.replace(tokens=jnp.zeros_like(state.tokens)), queries,
      strict.replace(tokens=jnp.zeros_like(strict.tokens)), strict.had_draft,
      jnp.zeros_like(strict.had_draft))
  state = state.replace(q=jnp.full_like(state.q, 0.25))
  again, lenient = judge(state, 1.0), judge(state, 0.3)
  assert lenient.accepted.sum() == again.had_draft.sum() > again.accepted.sum()


def test_a_token_without_a_distribution_is_no_draft():
  """What stands in for a token is generated like a token that holds none."""
  model = kit.chain(2, 3, vocab=4)
  state = drafted(model, 1)
  queries = queries_of(model, state, size=2)
  p = jnp.eye(4)[jnp.array([3, 2])]
  verdict = rows_lib.verify(context(model), state, queries.slots, p)
  assert not verdict.had_draft.any()
  np.testing.assert_array_equal(verdict.tokens, [3, 2])


def test_defaults_are_cut_and_other_values_are_not():
  """Only an explicit value that cannot be is an error."""
  assert rows_lib.at_most(None, 6, 2, "rows", "the rows") == 2
  assert rows_lib.at_most(None, 6, 9, "rows", "the rows") == 6
  assert rows_lib.at_most(2, 6, 3, "rows", "the rows") == 2
  with pytest.raises(UserError, match="rows to be at most 2.*, got rows=7"):
    rows_lib.at_most(7, 6, 2, "rows", "the rows")
