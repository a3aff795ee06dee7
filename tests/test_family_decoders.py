"""Every decoder on every kind of family, at toy size, with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_families import CONFIGS

from ssd_jax import sampling
from ssd_jax.decoding import engine
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.by_name import DECODERS
from ssd_jax.families.published import left_padded
from ssd_jax.loading import _FAMILIES
from ssd_jax.models.drafter import DraftNet, bind_drafter
from ssd_jax.models.spatial_heads import (
    HeadsConfig,
    HeadsOptions,
    SpatialHeads,
    bind_heads,
)

_ROWS = ([60, 61, 37], [60, 62, 63, 61, 37], [37, 43], [37, 43])  # cond, uncond


@functools.cache
def network(name):
  """(family, params with heads and drafter, model) of random weights."""
  config = CONFIGS[name]()
  family = _FAMILIES[config.family]({"config": config.to_dict()}, None)
  generator = family.generator
  keys = jax.random.split(jax.random.key(0), 3)
  params = jax.jit(generator.init)(keys[0])
  params["trunk"]["embedding"] *= 30.0  # predictions that depend on context
  params["drafter"] = DraftNet(generator).init(keys[1])
  cfg = HeadsConfig.make(generator, HeadsOptions(2, 1))
  params["heads"] = SpatialHeads(generator, cfg).init(keys[2])
  model = bind_drafter(generator, bind_heads(generator, cfg, params))
  return family, params, model


def prompt_of(name, family):
  """Two prompts of different lengths and their unconditional rows."""
  if name == "llamagen_text":
    features = jax.random.normal(jax.random.key(1), (2, 12, 32))
    mask = np.arange(12) < np.array([[3], [7]])
    return family.from_features(np.asarray(features), mask, guided=True)
  if name == "llamagen_class":
    return family.encode_prompts([3, 7], guided=True)[0]
  return left_padded(_ROWS, family.grid.length)


@functools.cache
def draw(name, decoder):
  """What a decoder draws greedily, guided."""
  family, params, model = network(name)
  settings = sampling.Sampling.make(guidance=2.5, top_k=1)
  return engine.decode(
      model, decoder, params, prompt_of(name, family), settings,
      jax.random.key(0), jnp.arange(2))


@pytest.mark.slow
@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize(
    "name", ["lumina", "janus", "emu3", "llamagen_class", "llamagen_text"])
def test_decoders_on_families(name, decoder):
  """Greedily, what is lossless draws AR's picture; nothing takes longer."""
  decoder = DECODERS[decoder]()
  drawn, expected = draw(name, decoder), draw(name, AR())
  if decoder.lossless:
    np.testing.assert_array_equal(drawn.tokens, expected.tokens)
  assert np.all((drawn.tokens >= 0) & (drawn.tokens < 32))
  assert np.all(drawn.passes <= expected.passes)
  assert len(np.unique(expected.tokens)) > 2
