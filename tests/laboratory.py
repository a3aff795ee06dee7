"""Grids so small that laws can be tested, on random trunks with random heads.

Decodes without painting pictures: no tokenizer is compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from scipy import stats

from ssd_jax import testing
from ssd_jax.decoding import engine
from ssd_jax.decoding.ar import AR
from ssd_jax.grid import Grid
from ssd_jax.models.text import Vocabulary
from ssd_jax.pipeline import Pipeline
from ssd_jax.sampling import Sampling

_PROMPT = "ab"


@functools.cache
def tiny(
    rows=2, cols=2, vocab=3, end_of_row=False, heads=(5, 5), guidance=1.0
):
  """A pipeline without tokenizer; heads know nothing but their inputs."""
  sampling = dict(guidance=guidance, temperature=1.0, top_k=0, top_p=1.0)
  family = testing.TinyFamily(
      ml_collections.ConfigDict(dict(sampling=sampling)), Vocabulary((), 8),
      Grid(rows, cols, end_of_row), vocab,
  )
  trunk = jax.jit(family.generator.init)(jax.random.key(0))["trunk"]
  trunk = {**trunk, "embedding": 30.0 * trunk["embedding"],
           "head": 1.2 * trunk["head"]}
  model = family.generator.model()
  if heads != (0, 0):
    model = dataclasses.replace(model, draft=_Draft(model), heads=heads)
  return Pipeline(family, {"trunk": trunk}, None, model)


class _Draft:
  """Logits of a rolled state and the token's embedding."""

  def __init__(self, model):
    self.model = model

  def __call__(self, params, direction, offset, hidden, tokens):
    turn = 2 * offset + (direction == "vertical")
    x = hidden + 0.5 * self.model.embed(params, tokens)
    return self.model.logits(params, jnp.roll(x, turn, axis=-1))


def draw(pipe, decoder, count=20_000, seed=3, batch=None, trace=False):
  """`count` grids of one prompt, in one batch unless told otherwise."""
  batch = batch or count
  guidance = pipe.family.sampling["guidance"]
  prompt, _ = pipe.family.encode_prompts([_PROMPT] * batch, guidance != 1.0)
  parts = [
      engine.decode(
          pipe.model, decoder, pipe.params, prompt, Sampling.make(guidance),
          jax.random.key(seed), first + jnp.arange(batch), trace=trace,
      )
      for first in range(0, count, batch)
  ]
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def p_value(pipe, tokens):
  """Of the chi-square test against the exact joint law, small cells pooled."""
  images = testing.every_image(pipe)
  log_p = pipe.log_prob(images, [_PROMPT] * len(images))
  p = np.exp(log_p.astype(np.float64))
  np.testing.assert_allclose(p.sum(), 1.0, atol=1e-4)
  powers = pipe.model.vocab ** np.arange(pipe.model.grid.cells)[::-1]
  found = np.bincount(
      tokens.reshape(len(tokens), -1) @ powers, minlength=len(images)
  )
  expected = p / p.sum() * len(tokens)
  order = np.argsort(expected)
  small = order[np.cumsum(expected[order]) < 10]
  large = np.setdiff1d(order, small)
  pool = lambda x: np.append(x[large], x[small].sum())
  found, expected = pool(found), pool(expected)
  kept = expected > 0
  scale = found[kept].sum() / expected[kept].sum()
  return stats.chisquare(found[kept], expected[kept] * scale).pvalue


def assert_lossless(pipe, decoder):
  """The law of 20,000 grids is AR's: p above 1e-3; returns what was drawn.

  A bias of 3 % in the probability of one grid in ten would be seen.
  """
  out = draw(pipe, decoder)
  p = p_value(pipe, out.tokens)
  print(decoder, "p", p, "passes", out.passes.mean())
  assert p > 1e-3
  return out


def assert_same_as_ar(pipe, decoder, count=12):
  """Token for token; returns the decoder's output."""
  expected = draw(pipe, AR(), count)
  out = draw(pipe, decoder, count)
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  return out


def assert_independent_of_batch(pipe, decoder):
  """Batch 1 and batch 4 give the same tokens and passes."""
  one, four = (draw(pipe, decoder, 4, batch=batch) for batch in (1, 4))
  np.testing.assert_array_equal(one.tokens, four.tokens)
  np.testing.assert_array_equal(one.passes, four.passes)
  np.testing.assert_array_equal(one.commit_pass, four.commit_pass)


def assert_well_recorded(out):
  """Every cell became final once, the last one in the last pass."""
  assert (out.commit_pass >= 1).all()
  np.testing.assert_array_equal(out.commit_pass.max((1, 2)), out.passes)
