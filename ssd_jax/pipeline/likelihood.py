"""Likelihood of token grids under the model itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssd_jax.core.types import Prompt
from ssd_jax.decoding import sampling as sampling_lib
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.models.generator import Generator


def token_nll(generator: Generator) -> Callable[..., list[jax.Array]]:
  """Returns a jitted (params, prompt, sequence [B, N], sampling) -> two arrays.

  Both are float32 [B, R, C], in nats: the negative log-probability of each
  token, and the entropy of the distribution that it was looked up in. That is
  the guided distribution at the temperature (1 if that is 0), before top-k and
  top-p, given all tokens before it in raster order.
  """
  slots = generator.grid.slot_of

  @jax.jit
  def function(params, prompt: Prompt, sequence_BN, settings: Sampling):
    streams = prompt.tokens.shape[0] // sequence_BN.shape[0]
    hidden = generator.hidden(
        params, prompt, jnp.concatenate([sequence_BN] * streams))
    hidden = hidden.reshape(streams, -1, *hidden.shape[1:])[:, :, slots]
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)

    def look_up(row):
      hidden_GBCD, taken_BC = row
      logits = sampling_lib.guide(
          generator.logits(params, hidden_GBCD), settings.guidance)
      log_p = jax.nn.log_softmax(logits / temperature)
      taken = jnp.take_along_axis(log_p, taken_BC[..., None], -1)[..., 0]
      return -taken, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    # Row by row: the logits of a whole image may not fit into memory.
    rows = (jnp.moveaxis(hidden, 2, 0),
            jnp.moveaxis(sequence_BN[:, slots], 1, 0))
    return [jnp.moveaxis(x, 0, 1) for x in jax.lax.map(look_up, rows)]

  return function
