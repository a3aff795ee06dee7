"""SSD: published counts, equal schedules, and where it is exact."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Model
from ssd_jax.decoding.rows.ssd import SSD
from tests.support import testkit as kit

_JANUS = (24, 24, False)
_LUMINA = (48, 48, True)


def staged(vertical, staged_rounds):
  """The published settings for 48x48."""
  return SSD(vertical=vertical, rounds=5, schedule="staged",
             staged_rounds=staged_rounds)


def pipelined(rounds, lag):
  """Rows that enter every `lag` passes."""
  return SSD(rounds=rounds, schedule="pipelined", lag=lag)


@pytest.mark.quick(1)
@pytest.mark.parametrize("grid, decoder, published", [
    (_JANUS, SSD(), 80),
    (_LUMINA, staged(2, 4), 281),
    (_LUMINA, pipelined(5, 1), 74),
])
def test_passes_are_the_published_ones(grid, decoder, published):
  """The counts of the paper; with row ends one less, as they ride along: the
  paper counts the end of the first row as a pass."""
  rows, cols, end_of_row = grid
  out = kit.run(kit.chain(rows, cols, end_of_row), decoder, 1)
  assert out.passes.tolist() == [published - int(end_of_row)]
  kit.assert_well_recorded(out)


@pytest.mark.slow
def test_heads_run_only_when_they_are_due():
  """Per image one group of row 0 in three passes, then a row in three; with
  attention, guidance and forced tokens, which change no count."""
  asked = []
  pipe = kit.tiny(4, 4, end_of_row=True, guidance=2.0)

  def draft(params, direction, offset, hidden, tokens):
    jax.debug.callback(lambda _: asked.append((direction, offset)), tokens[0])
    return pipe.model.draft(params, direction, offset, hidden, tokens)

  heard = dataclasses.replace(pipe, model=dataclasses.replace(
      pipe.model, draft=draft))
  out = kit.draw(heard, SSD(horizontal=2, horizontal_rounds=1), 2)
  jax.effects_barrier()
  assert out.passes.tolist() == [1 + 2 * 2 + 3 * 3] * 2
  groups = {("horizontal", 1): 2, ("horizontal", 2): 2, ("vertical", 1): 3}
  assert collections.Counter(asked) == {k: 2 * n for k, n in groups.items()}


@pytest.mark.slow
def test_heads_read_the_state_and_the_token_they_start_from():
  """Drafts that nobody corrects say what they were sampled from."""
  grid, vertical = Grid(5, 6, end_of_row=True), 2
  slots, codes = np.asarray(grid.slot_of), 3 * grid.length
  state_of_slot_0 = codes - 1  # the prefill's

  def drawn(say):
    model = Model(
        grid, codes, lambda params, prompt, scratch: (
            jnp.full((len(prompt.tokens), 1), state_of_slot_0), None),
        lambda params, cache, prompt, queries: (
            queries.positions[..., None], cache),
        lambda params, hidden: jnp.zeros((*hidden.shape[:-1], codes)), None,
        lambda params, direction, offset, hidden, tokens: 1e9 * jax.nn.one_hot(
            say(offset, hidden[..., 0], tokens) % codes, codes), (3, vertical))
    decoder = SSD(
        horizontal=3, vertical=vertical, rounds=0, horizontal_rounds=0)
    return kit.run(model, decoder, 1).tokens[0]

  states = drawn(lambda offset, state, token: state)
  tokens = drawn(lambda offset, state, token: token + offset)
  for row, col in np.ndindex(grid.rows, grid.cols):
    if (row, col) == (0, 0):
      continue
    source = ((row - 1) // vertical * vertical, col) if row else (
        0, (col - 1) // 3 * 3)
    offset = row - source[0] or col - source[1]
    slot = slots[source] if row else source[1]
    assert states[row, col] == (slot - 1 if slot else state_of_slot_0)
    assert tokens[row, col] == (tokens[source] + offset) % codes


@pytest.mark.slow
def test_a_lag_of_a_whole_row_is_joint():
  """A pipeline with lag = rounds + 1 is the paper's, token for token."""
  model = kit.chain(6, 5, True, vocab=9)
  joint, late = kit.run(model, SSD()), kit.run(model, pipelined(2, 3))
  np.testing.assert_array_equal(joint.tokens, late.tokens)
  np.testing.assert_array_equal(joint.commit_pass, late.commit_pass)


@pytest.mark.slow
def test_blocks_of_rows():
  """Staged with no rounds of its own is the joint schedule. If adaptive, a
  round that changes nothing is a row's last: never more passes."""
  model = kit.chain(8, 6)
  joint = SSD(vertical=3, rounds=5)
  out = kit.run(model, joint, 16)
  single = kit.run(model, staged(3, 0), 16)
  np.testing.assert_array_equal(out.tokens, single.tokens)
  adaptive = kit.run(model, dataclasses.replace(joint, adaptive=True), 16)
  kit.assert_well_recorded(adaptive)
  assert adaptive.passes.max() <= out.passes[0]
  assert adaptive.passes.mean() < out.passes[0]


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch():
  """Batch 1 and batch 4 give the same tokens and passes."""
  kit.assert_independent_of_batch(kit.chain(6, 5, True, vocab=9), SSD())


@pytest.mark.slow
@pytest.mark.parametrize("grid, decoder", [
    (dict(rows=1, cols=4), SSD(horizontal=1)),
    (dict(rows=3, cols=1, top_k=2, top_p=0.9, guidance=2.0), SSD(rounds=1)),
])
def test_blocks_of_one_token_are_lossless(grid, decoder):
  """A round corrects a draft whose context is final to the target's
  distribution."""
  assert_ar_distribution(kit.tiny(**grid), decoder)


def assert_ar_distribution(pipe, decoder):
  """Which SSD does not claim, as it depends on the grid."""
  assert kit.p_value(pipe, kit.draw(pipe, decoder).tokens) > 1e-3


@pytest.mark.slow
def test_lenience_keeps_more_drafts_at_the_same_passes():
  """Fewer drafts are resampled, in as many passes, and the same test sees that
  the distribution gives way."""
  pipe = kit.tiny(rows=1, cols=4)
  strict, lenient = (
      kit.draw(pipe, SSD(horizontal=1, lenience=x)) for x in (1.0, 0.05))
  np.testing.assert_array_equal(strict.passes, lenient.passes)
  assert kit.p_value(pipe, lenient.tokens) < 1e-3


@pytest.mark.slow
def test_argmax_drafts():
  """Greedy drafts are tested as what they are: their distribution is exact as
  well."""
  assert_ar_distribution(
      kit.tiny(rows=1, cols=4), SSD(horizontal=1, drafts="argmax")
  )


@pytest.mark.quick(1)
@pytest.mark.parametrize("rows, cols, end_of_row", [
    (7, 1, True), (1, 7, False), (1, 1, False),
])
def test_single_rows_and_columns(rows, cols, end_of_row):
  """Grids of one row or one column have only groups, or only blocks."""
  out = kit.run(kit.chain(rows, cols, end_of_row), SSD())
  kit.assert_well_recorded(out)
  assert (out.passes == 1 + 2 * -(-(cols - 1) // 5) + 3 * (rows - 1)).all()


@pytest.mark.slow
def test_impossible_settings_are_one_line():
  """What cannot be is a UserError, not a crash."""
  for settings in (
      dict(lag=0), dict(rounds=-1), dict(vertical=0), dict(schedule="late"),
      dict(schedule="pipelined", lag=4), dict(schedule="pipelined", vertical=2),
      dict(drafts="best"), dict(lenience=0), dict(lenience=1.5),
      dict(lag=1), dict(staged_rounds=3),
      dict(schedule="staged", lag=1),  # nothing would read it
  ):
    with pytest.raises(UserError, match="Expected .*, got .*"):
      SSD(**settings)
  with pytest.raises(
      UserError, match="Expected vertical to be at most 2.*, got vertical=3"):
    kit.run(kit.chain(3, 4, heads=(5, 2)), SSD(vertical=3))
  with pytest.raises(UserError, match="spatial head"):
    kit.run(kit.chain(3, 4, heads=(0, 0)), SSD())
  # The paper's five heads are a default; asking for five is asking for five.
  two = kit.chain(3, 4, heads=(2, 1))
  with pytest.raises(UserError, match="at most 2 .*horizontal=5"):
    kit.run(two, SSD(horizontal=5))
  kit.run(two, SSD())
