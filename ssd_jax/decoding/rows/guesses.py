"""Guesses of the first open token of each row; see `decoding.fan`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssd_jax.decoding import acceptance, fan as fan_lib
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.fan import Fan
from ssd_jax.decoding.rows import state as rows_lib
from ssd_jax.decoding.rows.state import Rows, Verdict

# Verdict of the slots after those given, by the targets given.
Judge = Callable[[jax.Array, jax.Array], Verdict]


def guess(
    ctx: Context, state: Rows, rows: int, count: int, coupled: bool
) -> Fan:
  """Guesses the first open tokens of the first rows of the window.

  Args:
    ctx: Context of the pass.
    state: State before the pass.
    rows: Number of rows F.
    count: Guesses K of each.
    coupled: Whether slots are resampled with their own noise in every pass.
  """
  grid = ctx.model.grid
  row_F = state.lead + jnp.arange(rows)
  col_F = rows_lib.prefix(grid, state.final).at[row_F].get(
      mode="fill", fill_value=grid.cols)
  is_open_F = (row_F < state.entered) & (col_F < grid.cols)
  slots_F = jnp.where(is_open_F, row_F * grid.row_slots + col_F, grid.length)
  q_FV = state.q.at[rows_lib.window_index(state, row_F, col_F)].get(
      mode="fill", fill_value=0.0)
  drafts_F = state.tokens.at[slots_F].get(mode="fill", fill_value=0)
  if coupled:
    noise_FV = ctx.token_noise(slots_F)
  else:
    noise_FV = jax.random.gumbel(ctx.pass_key(rows_lib.GUESS), q_FV.shape)
  return fan_lib.guess(slots_F, drafts_F, q_FV, noise_FV, count)


def apply(
    ctx: Context, state: Rows, fan: Fan, verdict: Verdict, p_JV: jax.Array,
    judge: Judge, coupled: bool,
) -> tuple[Verdict, jax.Array]:
  """Resamples rejected first tokens with the fan's noise.

  Where the new token was guessed, the token behind it gets the verdict of the
  guess's target.

  Args:
    ctx: Context of the pass.
    state: State before the pass.
    fan: Guesses of the pass.
    verdict: Outcome of the pass without them.
    p_JV: Targets of the F K guesses.
    judge: Verdict of the slots after those given.
    coupled: As for `guess`.

  Returns:
    The outcome, and which first tokens were guessed, bool [F].
  """
  grid, size = ctx.model.grid, verdict.slots.shape[0]
  is_at = lambda is_Q, at_F: is_Q.at[at_F].get(mode="fill", fill_value=False)
  at_F = _find(verdict, fan.slots)
  is_new_F = is_at(verdict.had_draft & ~verdict.accepted, at_F)
  p_FV = verdict.p.at[at_F].get(mode="fill", fill_value=0.0)
  drafts = _drafts(state, verdict, fan.slots, at_F)
  tokens_F, guess_F = fan.resample(
      p_FV if coupled else acceptance.residual(p_FV, drafts))
  tokens_Q = verdict.tokens.at[jnp.where(is_new_F, at_F, size)].set(
      tokens_F, mode="drop")
  # The token behind it, in the same row.
  _, col_F = rows_lib.row_and_column(grid, fan.slots)
  next_F = jnp.where(col_F + 1 < grid.cols, fan.slots + 1, grid.length)
  next_at_F = _find(verdict, next_F)
  count = fan.tokens.shape[1]
  is_right_F = (
      is_new_F & (guess_F < count) & is_at(verdict.had_draft, next_at_F))
  p_FKV = p_JV.reshape(-1, count, p_JV.shape[-1])
  p_next_FV = jnp.take_along_axis(
      p_FKV, jnp.minimum(guess_F, count - 1)[:, None, None], axis=1)[:, 0]
  second = judge(jnp.where(is_right_F, fan.slots, grid.length), p_next_FV)
  at_F = jnp.where(is_right_F, next_at_F, size)
  put = lambda x_Q, x_F: x_Q.at[at_F].set(x_F, mode="drop")
  return verdict.replace(
      tokens=put(tokens_Q, second.tokens),
      accepted=put(verdict.accepted, second.accepted),
      p=put(verdict.p, second.p),
      distribution=put(verdict.distribution, second.distribution)), is_right_F


def _find(verdict: Verdict, slots_F: jax.Array) -> jax.Array:
  """Returns which queries predict the slots, int32 [F]; Q where none does."""
  is_found_FQ = verdict.slots == slots_F[:, None]
  return jnp.where(jnp.any(is_found_FQ, axis=1),
                   jnp.argmax(is_found_FQ, axis=1), verdict.slots.shape[0])


def _drafts(
    state: Rows, verdict: Verdict, slots_F: jax.Array, at_F: jax.Array
) -> Drafts:
  """Returns the drafts of slots that the queries `at_F` predict."""
  outside = state.q.shape[0]
  index_F = verdict.index.at[at_F].get(mode="fill", fill_value=outside)
  return Drafts(
      state.tokens.at[slots_F].get(mode="fill", fill_value=0),
      state.q.at[index_F].get(mode="fill", fill_value=0.0),
      jnp.zeros(slots_F.shape, bool))
