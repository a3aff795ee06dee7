"""Rows in flight: what is fed, what is seen, what moves along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import testkit as kit

from ssd_jax.config import UserError
from ssd_jax.decoding import rows as rows_lib
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.stair import Stair
from ssd_jax.sampling import Sampling


def context(model):
  """Of the second pass of image 0."""
  return Context(
      jax.random.key(0), jnp.int32(0), jnp.int32(2), {}, Sampling.make(), model
  )


def full(model, rows, drafted=()):
  """The state of a full window after the prefill, with rows drafted."""
  first_R, width = rows_lib.full_window(model.grid, rows)
  state = rows_lib.start(
      context(model), jnp.ones(model.vocab) / model.vocab, jnp.ones((1, 1)),
      first_R, width,
  )
  slots = model.grid.slot_of[list(drafted)].ravel()
  return state.replace(
      known=state.known.at[slots].set(True), entered=jnp.int32(len(drafted))
  )


def fed(model, state, **kwargs):
  """(slots fed, slots each of them sees)."""
  queries = rows_lib.propose(context(model), state, **kwargs)
  return {
      int(slot): set(np.flatnonzero(seen).tolist())
      for slot, seen in zip(queries.slots, queries.visible)
      if slot < model.grid.length
  }


@pytest.mark.parametrize("end_of_row", [False, True])
def test_a_full_window_predicts_each_cell_once(end_of_row):
  """R x row slots queries predict every open cell of R rows."""
  model = kit.chain(5, 4, end_of_row)
  state = full(model, 3, drafted=range(3))
  queries = rows_lib.propose(context(model), state)
  assert queries.slots.shape == (3 * model.grid.row_slots,)
  p = jnp.full((len(queries.slots), model.vocab), 0.5)
  verdict = rows_lib.judge(context(model), state, queries, p)
  cells = np.asarray(verdict.cells)[np.asarray(verdict.is_open)]
  np.testing.assert_array_equal(cells, model.grid.slot_of[:3].ravel()[1:])


def test_what_was_never_fed_is_not_seen():
  """Only fed slots before a query are visible, itself included."""
  model = kit.chain(3, 3)
  state = full(model, 3, drafted=range(3))
  state = state.replace(known=state.known.at[4].set(False))
  seen = fed(model, state)
  assert seen[5] == {0, 1, 2, 3, 5}
  state = state.replace(written=state.written.at[4].set(True))
  assert fed(model, state)[5] == {0, 1, 2, 3, 4, 5}


def test_row_causal_hides_drafts_of_other_rows():
  """A query sees final cells, its own row and the slot before it."""
  model = kit.chain(3, 3)
  state = full(model, 2, drafted=range(2))
  seen = fed(model, state, row_causal=True)
  assert seen[1] == {0, 1}
  assert seen[2] == {0, 2}  # it predicts row 1
  assert seen[4] == {0, 2, 3, 4}


def test_the_distributions_move_with_their_cells():
  """A cell keeps its q when the window begins elsewhere."""
  model = kit.chain(5, 3)
  state = full(model, 2)
  state = state.replace(q=jnp.arange(6.0)[:, None] * jnp.ones(model.vocab))
  moved = rows_lib.move(state, jnp.int32(1), state.first)
  np.testing.assert_array_equal(moved.q[:, 0], [3, 4, 5, 0, 0, 0])
  shifted = rows_lib.move(state, jnp.int32(0), state.first + 1)
  np.testing.assert_array_equal(shifted.q[:, 0], [1, 2, 0, 4, 5, 0])
  for row, col in ((0, 1), (1, 2)):
    index = rows_lib.window_index(state, jnp.int32(row), jnp.int32(col))
    assert index == 3 * row + col


def test_a_row_stays_until_its_end_was_fed():
  """A window may not leave a row whose end the row below has yet to feed."""
  model = kit.chain(4, 2)
  grid, state = model.grid, full(model, 2)
  state = state.replace(
      final=state.final.at[:4].set(True), settled=state.settled.at[0].set(True)
  )
  assert rows_lib.full_lead(grid, state) == 1
  assert rows_lib.narrow_lead(grid, state) == 0
  state = state.replace(settled=state.settled.at[:2].set(True))
  assert rows_lib.full_lead(grid, state) == 2


def test_a_token_without_a_distribution_is_no_draft():
  """What stands in for a token is drawn like a cell that holds none."""
  model = kit.chain(2, 3, vocab=4)
  state = full(model, 1, drafted=range(1))
  queries = rows_lib.propose(context(model), state)
  p = jnp.eye(4)[jnp.array([1, 3, 2])]
  verdict = rows_lib.judge(context(model), state, queries, p)
  assert not verdict.had_draft.any()
  np.testing.assert_array_equal(verdict.tokens[1:], [3, 2])


def test_defaults_are_cut_and_other_values_are_not():
  """Only an explicit value that cannot be is an error."""
  assert rows_lib.clamp(Stair(), "rows", 2, "the rows") == 2
  assert rows_lib.clamp(Stair(rows=2), "rows", 3, "the rows") == 2
  with pytest.raises(UserError, match="got rows=7, expected at most 2"):
    rows_lib.clamp(Stair(rows=7), "rows", 2, "the rows")
