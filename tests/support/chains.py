"""A pipeline without weights, for tests of what is around a model."""

import jax.numpy as jnp

from ssd_jax.core.types import Prompt
from ssd_jax.pipeline.pipeline import Pipeline
from tests.support import testkit


class Greys:
  """Any text; codes are shades of grey in tokens of 2 px."""

  name = "greys"
  sampling = dict(guidance=1.0, temperature=1.0, top_k=0, top_p=1.0)

  def __init__(self, model):
    self.model = model

  def encode_prompts(self, prompts, guided):
    rows = len(prompts) * (1 + guided)
    tokens = jnp.zeros((rows, 1), jnp.int32)
    places = jnp.zeros((rows, 1 + self.model.grid.length), jnp.int32)
    return Prompt(tokens, tokens == 0, places), []

  def decode(self, vq_params, tokens_BRC):
    grey = (tokens_BRC * 255 // (self.model.vocab - 1)).astype(jnp.uint8)
    grey = jnp.kron(grey, jnp.ones((2, 2), jnp.uint8))
    return jnp.stack([grey] * 3, -1)


def pipeline(rows=4, cols=4, vocab=5):
  """Generates any text on such a grid with any decoder but the trees."""
  model = testkit.chain(rows, cols, vocab=vocab)
  return Pipeline(Greys(model), {}, None, model)
