"""Decoders on families with forced tokens, hidden slots and two dimensions.

Lumina and Emu3 end rows with a forced token and start their two streams at
different positions; LlamaGen has positions in two dimensions and condition
slots that are hidden.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.decoding import engine, registry
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.registry import DECODERS
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.families.published import left_padded
from ssd_jax.models.drafter import DraftNet, bind_drafter
from ssd_jax.models.spatial_heads import (
  HeadsConfig,
  HeadsOptions,
  SpatialHeads,
  bind_heads,
)
from ssd_jax.pipeline import model_folder, testing
from ssd_jax.pipeline.pipeline import Pipeline
from tests.support.toy_families import CONFIGS

_NAMES = ("emu3", "llamagen_text", "lumina")
_ROWS = ([60, 61, 37], [60, 62, 63, 61, 37], [37, 43], [37, 43])  # cond, uncond


def settings_of(name):
  """A family's settings for a grid of 4 x 4 or 3 x 3 tokens."""
  config = CONFIGS[name]()
  if name == "lumina":
    config.size = "64x64"
  elif name == "emu3":
    config.ratio, config.area = "1:1", 3 * 3 * 4 * 4
  elif name == "emu3_5":
    config.ratio = "3x3"
  elif "side" in config:
    config.side = 3
  heads = 1 if name == "emu3" else 2
  config.trunk.update(d_model=16, n_heads=2, n_kv_heads=heads, head_dim=8,
                      d_ff=24)
  return config


@functools.cache
def pipeline(name):
  """A family with random trunk, heads and drafter; it paints no images."""
  config = settings_of(name)
  family = model_folder.FAMILIES[config.family](
    {"config": config.to_dict()}, None
  )
  generator = family.generator
  keys = jax.random.split(jax.random.key(0), 3)
  params = jax.jit(generator.init)(keys[0])
  params["trunk"]["embedding"] *= 30.0  # predictions that depend on context
  params["drafter"] = DraftNet(generator).init(keys[1])
  cfg = HeadsConfig.make(generator, HeadsOptions(2, 1))
  params["heads"] = SpatialHeads(generator, cfg).init(keys[2])
  model = bind_drafter(generator, bind_heads(generator, cfg, params))
  return Pipeline(family, params, None, model)


def prompt_of(name, family):
  """Two prompts of different lengths and their unconditional rows."""
  if name == "llamagen_class":
    return family.encode_prompts(["3", "7"], guided=True)[0]
  if name != "llamagen_text":
    return left_padded(_ROWS, family.grid.length)
  features = jax.random.normal(jax.random.key(1), (2, 12, 32))
  mask = np.arange(12) < np.array([[3], [7]])
  return family.from_features(np.asarray(features), mask, guided=True)


@functools.cache
def draw(name, decoder):
  """What a decoder generates greedily, guided."""
  pipe = pipeline(name)
  args = (pipe.programs.params_for(decoder), prompt_of(name, pipe.family),
          Sampling.make(guidance=2.5, temperature=0.0), jax.random.key(0),
          jnp.arange(2))
  return engine.decode(pipe.model, decoder, *args)


@pytest.mark.slow
@pytest.mark.parametrize("name, decoder", [
    *((name, "exact") for name in _NAMES), ("llamagen_text", "sjd"),
    ("lumina", "eagle"), ("emu3", "ssd")])
def test_decoders_on_families(name, decoder):
  """Greedily, what is lossless generates AR's image; nothing takes longer.

  What a decoder sees of a family is its grid and forced tokens; positions and
  hidden slots are the trunk's. So each way of feeding slots is tried: rows,
  a window, a tree, heads.
  """
  decoder = DECODERS[decoder]()
  drawn, expected = draw(name, decoder), draw(name, AR())
  if decoder.lossless:
    np.testing.assert_array_equal(drawn.tokens, expected.tokens)
  assert np.all((drawn.tokens >= 0) & (drawn.tokens < 32))
  assert np.all(drawn.passes <= expected.passes)
  assert len(np.unique(expected.tokens)) > 2


@functools.cache
def small():
  """A guided pipeline with heads and a drafter."""
  return testing.tiny(vocab=5, rows=3, cols=4, guidance=2.0)


@pytest.mark.parametrize("name", registry.DECODERS)
def test_every_decoder_has_the_promised_shapes(name):
  """Traced whole, but not compiled: grids, passes and commit passes."""
  pipe, decoder = small(), registry.parse(name)
  settings, guided = pipe.sampling()
  prompt, _ = pipe.family.encode_prompts(["a", "b"], guided)
  out = jax.eval_shape(
      lambda params: engine.decode(
          pipe.model, decoder, params, prompt, settings, jax.random.key(0),
          jnp.arange(2)),
      pipe.programs.params_for(decoder))
  chex.assert_shape([out.tokens, out.commit_pass], (2, 3, 4))
  chex.assert_shape(out.passes, (2,))
  chex.assert_type([out.tokens, out.passes, out.commit_pass], "int32")
