"""Guesses of what a rejected draft will be resampled to.

Most passes of a lossless decoder end at the first open slot n: its draft is
rejected, and the drafts behind it were made beside the old token. Yet the new
token can be guessed. If it is resampled as argmax(log residual + G), with
Gumbel noise G that is drawn before the pass feeds anything, then the best
tokens under log q + G are likely to be it. Further queries feed these guesses
at position n, each into a scratch slot. If one of them is right, its target of
slot n + 1 is the model's: the draft there is tested with it, and two tokens
become final instead of one.

The distribution is unchanged whatever the guesses are. G is independent of the
past, of the draft and of its test, so the token of slot n follows the residual.
Which target tests slot n + 1 depends on G and on the slots before it alone, and
that test has noise of its own. With shared noise (`coupled`) G is the slot's
own in every pass, and both tokens are AR's.
"""

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import check
from ssd_jax.core.types import Queries
from ssd_jax.decoding import sampling


class Fan(flax.struct.PyTreeNode):
  """Guesses K of the tokens of F slots.

  Attributes:
    slots: int32 [F], the slots n; N where there is none.
    tokens: int32 [F, K], the guesses.
    noise: float32 [F, V], the Gumbel noise that the slots are resampled with.
  """

  slots: jax.Array
  tokens: jax.Array
  noise: jax.Array

  def resample(self, p_FV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples the slots' tokens from unnormalised probabilities.

    Returns:
      The tokens, int32 [F], and which guesses they are, int32 [F]; K if none.
    """
    tokens_F = sampling.sample(p_FV, self.noise)
    is_right_FK = self.tokens == tokens_F[:, None]
    guess_F = jnp.argmax(is_right_FK, axis=1)
    return tokens_F, jnp.where(
        jnp.any(is_right_FK, axis=1), guess_F, self.tokens.shape[1])


def num_guesses(fan: int, vocab: int) -> int:
  """Returns how many tokens a fan feeds beside the draft.

  Raises:
    UserError: There are fewer tokens than that.
  """
  check(fan <= vocab, "fan", fan, f"at most {vocab} (the image tokens)")
  return fan - 1


def guess(
    slots_F: jax.Array, drafts_F: jax.Array, q_FV: jax.Array,
    noise_FV: jax.Array, count: int,
) -> Fan:
  """Returns the best tokens under the drafts' distributions and the noise.

  Args:
    slots_F: The slots that are guessed; N where there is none.
    drafts_F: Their drafts, which are fed anyway.
    q_FV: Distributions that the drafts were sampled from.
    noise_FV: Gumbel noise that the slots are resampled with.
    count: Number of guesses K.
  """
  is_draft_FV = jnp.arange(q_FV.shape[1]) == drafts_F[:, None]
  score_FV = jnp.where(is_draft_FV, -jnp.inf, jnp.log(q_FV) + noise_FV)
  tokens_FK = jax.lax.top_k(score_FV, count)[1].astype(jnp.int32)
  return Fan(slots_F, tokens_FK, noise_FV)


def append(queries: Queries, fan: Fan) -> Queries:
  """Returns a pass's queries followed by those of the guesses, Q + F K.

  A guess of slot n sees what the query at n sees, but itself instead of n. It
  writes to one of F K scratch slots behind the sequence. The guesses of a slot
  that the pass does not feed are inactive.

  Args:
    queries: Queries of the pass, which see the N slots of the sequence.
    fan: The guesses.
  """
  guesses, length = fan.tokens.size, queries.visible.shape[1]
  count = fan.tokens.shape[1]
  slots = length + guesses
  is_query_FQ = queries.slots == fan.slots[:, None]
  before_FN = queries.visible[jnp.argmax(is_query_FQ, axis=1)]
  before_FN &= jnp.arange(length) != fan.slots[:, None]
  scratch_J = length + jnp.arange(guesses)
  is_fed_J = jnp.repeat(jnp.any(is_query_FQ, axis=1), count)
  visible_JX = jnp.concatenate(
      [jnp.repeat(before_FN, count, axis=0), jnp.eye(guesses, dtype=bool)], 1)
  positions_J = jnp.minimum(jnp.repeat(fan.slots, count), length - 1)
  main = queries.replace(
      slots=jnp.where(queries.slots < length, queries.slots, slots),
      visible=jnp.pad(queries.visible, ((0, 0), (0, guesses))))
  added = Queries(
      fan.tokens.reshape(-1), positions_J,
      jnp.where(is_fed_J, scratch_J, slots), visible_JX)
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), main, added)
