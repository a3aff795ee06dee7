"""What tests of decoders share: random trunks with heads, and checks.

Nothing here paints images, so that no tokenizer is compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Model, Prompt
from ssd_jax.decoding import engine
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.evaluation import exactness
from ssd_jax.models.vocabulary import Vocabulary
from ssd_jax.pipeline import testing
from ssd_jax.pipeline.pipeline import Pipeline

_PROMPT = "ab"

# Of a program whose HLO is read, and which nobody runs: it has the HLO that
# users get, and machine code that is made in half of the time.
HLO_ONLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@functools.cache
def tiny(
    rows=2, cols=2, vocab=3, end_of_row=False, heads=(5, 5), guidance=1.0,
    top_k=0, top_p=1.0,
):
  """A pipeline without tokenizer; heads know nothing but their inputs."""
  sampling = dict(
      guidance=guidance, temperature=1.0, top_k=top_k, top_p=top_p)
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


@functools.cache
def chain(rows, cols, end_of_row=False, vocab=2, heads=(5, 5)):
  """A model without a trunk: each token depends on the one before it.

  Compiles in no time and has grids of any size generated in seconds.
  """
  grid = Grid(rows, cols, end_of_row)

  def forward(params, cache, prompt, queries):
    phase = 1.7 * queries.tokens + 12.9 * queries.positions
    return jnp.sin(phase)[..., None], cache

  def draft(params, direction, offset, hidden, tokens):
    return logits(params, jnp.cos(hidden + offset * (tokens[..., None] + 1)))

  def logits(params, hidden):
    return 3.0 * jnp.sin(hidden * (1.0 + jnp.arange(vocab)))

  return Model(
      grid, vocab,
      lambda params, prompt, scratch: (jnp.ones((len(prompt.tokens), 1)), None),
      forward, logits, lambda params, tokens: tokens[..., None] * 1.0,
      draft if sum(heads) else None, heads,
  )


def run(model, decoder, count=4, batch=None):
  """`count` grids of a `chain`."""
  batch = batch or count
  prompt = Prompt(
      jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch, 1), bool),
      jnp.zeros((batch, 1 + model.grid.length), jnp.int32),
  )
  return _cut(count, batch, lambda index: engine.decode(
      model, decoder, {}, prompt, Sampling.make(), jax.random.key(1), index
  ))


def draw(pipe, decoder, count=20_000, seed=3, batch=None):
  """`count` grids of one prompt, in one batch by default."""
  batch = batch or count
  settings, guided = pipe.sampling()
  prompt, _ = pipe.family.encode_prompts([_PROMPT] * batch, guided)
  return _cut(count, batch, lambda index: engine.decode(
      pipe.model, decoder, pipe.params, prompt, settings,
      jax.random.key(seed), index,
  ))


def _cut(count, batch, decode):
  parts = [decode(i + jnp.arange(batch)) for i in range(0, count, batch)]
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def p_value(pipe, tokens):
  """Of the chi-square test against the exact joint distribution."""
  return exactness.chi_square(exactness.count(pipe, tokens), distribution(pipe))


@functools.cache
def distribution(pipe):
  """float64 [V ** tokens]: AR's joint distribution of the tiny grid."""
  return exactness.enumerate_distribution(pipe, _PROMPT)[1]


def assert_lossless(pipe, decoder, group=4):
  """The distribution of 10,000 grids is AR's: p above 1e-3; returns what was
  generated.

  A bias of 4 % in the probability of one grid in ten would be seen. Grids are
  decoded `group` at a time.
  """
  assert decoder.is_lossless(pipe.model.grid)
  out = exactness.sample_images(pipe, decoder, 10_000, group)
  p = p_value(pipe, out.tokens)
  print(decoder, "p", p, "passes", out.passes.mean())
  assert p > exactness.P_VALUE
  return out


def assert_same_as_ar(pipe, decoder, count=12):
  """Token for token; returns the decoder's output."""
  expected = draw(pipe, AR(), count)
  out = draw(pipe, decoder, count)
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  return out


def assert_independent_of_batch(model, decoder):
  """Batch 1 and batch 4 give the same tokens and passes."""
  one, four = (run(model, decoder, 4, batch) for batch in (1, 4))
  np.testing.assert_array_equal(one.tokens, four.tokens)
  np.testing.assert_array_equal(one.passes, four.passes)
  np.testing.assert_array_equal(one.commit_pass, four.commit_pass)


def assert_well_recorded(out):
  """Every token became final once, the last one in the last pass."""
  assert (out.commit_pass >= 1).all()
  np.testing.assert_array_equal(out.commit_pass.max((1, 2)), out.passes)
