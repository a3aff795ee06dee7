"""Layouts of a trunk: the same images, and no copy of weights in the loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.decoding import engine, registry
from ssd_jax.models import layouts as layouts_lib
from ssd_jax.models.layouts import inference_layout, unstack_layers
from ssd_jax.performance import compiled
from ssd_jax.pipeline import testing
from ssd_jax.runtime import memory
from tests.support import testkit as kit


@pytest.fixture(autouse=True)
def tiny_is_large(monkeypatch):
  """Trunks of any size are copied."""
  monkeypatch.setattr(layouts_lib, "_MIN_BYTES", 0)


@pytest.mark.slow
def test_layers_apart_generate_what_stacked_layers_do():
  """Decoders see the same model in both forms of its parameters."""
  pipe = testing.tiny(7, 3, 3, guidance=3.0)
  settings, guided = pipe.sampling()
  prompt, _ = pipe.family.encode_prompts(["ab"] * 2, guided)
  drawn = [
      engine.decode(
          pipe.model, registry.parse("ssd"), params, prompt, settings,
          jax.random.key(3), jnp.arange(2)).tokens
      for params in (pipe.params, inference_layout(pipe.params))]
  np.testing.assert_array_equal(*drawn)


@pytest.mark.slow
def test_a_stream_takes_caches_apart():
  """Images take places, and prompts grow, in each layer's cache."""
  pipe = testing.tiny(7, 3, 3, guidance=3.0)
  texts = ["a", "b", "a prompt that is longer than those before it", "c"]
  whole = pipe.generate(texts, "ar", batch=4)
  for picture in pipe.stream(texts, "ar", batch=2):
    np.testing.assert_array_equal(picture.tokens, whole.tokens[picture.index])
  assert "layers_0" in pipe.programs.params_for(registry.parse("ar"))["trunk"]


@pytest.fixture
def in_tiles(monkeypatch):
  """Trunks of any size are tiled, four columns to a tile."""
  monkeypatch.setattr(layouts_lib, "TILE", 4)


@pytest.mark.slow
def test_tiles_generate_what_whole_matrices_do(in_tiles):
  """Passes of few rows multiply by tiles, and generate the same."""
  pipe = kit.tiny(3, 3, vocab=8, guidance=3.0)
  settings, guided = pipe.sampling()
  prompt, _ = pipe.family.encode_prompts(["ab"] * 2, guided)
  params = inference_layout(pipe.params)
  assert params["tiles"]["head"].shape[::2] == (2, 4)
  # Whatever else is drawn with, an empty matrix would show.
  broken = {**params, "tiles": jax.tree.map(jnp.zeros_like, params["tiles"])}
  drawn = [
      engine.decode(pipe.model, registry.parse("ar"), each, prompt, settings,
                    jax.random.key(3), jnp.arange(2)).tokens
      for each in (pipe.params, params, broken)]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert (drawn[2] != drawn[0]).any()


def test_columns_that_make_no_whole_tiles_stay_whole(in_tiles):
  """Of 7 codes no tiles of 4 can be made, so there are none."""
  assert "tiles" not in inference_layout(kit.tiny(vocab=7).params)
  assert "tiles" in inference_layout(kit.tiny(vocab=8).params)


def test_taps_come_in_the_order_of_layers_from_both_forms():
  """States of the same layers are appended, whichever form is given."""
  pipe = kit.tiny()
  generator = dataclasses.replace(pipe.family.generator, taps=(1, 0))
  prompt, _ = pipe.family.encode_prompts(["ab"], False)
  tokens = jnp.zeros((1, generator.grid.length), jnp.int32)
  stacked = pipe.params["trunk"]
  found = [generator.hidden({"trunk": trunk}, prompt, tokens)
           for trunk in (stacked, unstack_layers(stacked))]
  np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_small_trunks_and_those_without_room_stay_stacked(monkeypatch):
  """Layers are copied where that pays and a copy fits twice over."""
  params = kit.tiny().params
  monkeypatch.setattr(memory, "free_bytes", lambda: 0)
  assert inference_layout(params) is params
  layers = sum(x.nbytes for x in jax.tree.leaves(params["trunk"]["layers"]))
  with_heads = testing.tiny().params  # which take more than these layers
  monkeypatch.setattr(memory, "free_bytes", lambda: 2 * layers)
  assert inference_layout(with_heads) is with_heads
  monkeypatch.setattr(memory, "free_bytes", lambda: None)  # nobody tells
  assert "layers_0" in inference_layout(params)["trunk"]
  monkeypatch.setattr(layouts_lib, "_MIN_BYTES", 1e8)
  assert inference_layout(params) is params


def _moves(monkeypatch, kinds, pipe, decoder, smallest, *forms):
  """What is moved in the loop and has so many bytes, by each form."""
  monkeypatch.setattr(compiled, "MOVES", kinds)
  settings, guided = pipe.sampling()
  prompt, _ = pipe.family.encode_prompts(["ab"], guided)
  return [
      compiled.moves_in_loops(engine.decode.lower(
          pipe.model, registry.parse(decoder), params, prompt, settings,
          jax.random.key(0), jnp.arange(1)).compile(kit.HLO_ONLY).as_text(),
          smallest)
      for params in forms]


def _least_bytes(stack):
  """Of one matrix of a stack."""
  matrices = [x for x in jax.tree.leaves(stack) if x.ndim == 3]
  return min(x.nbytes // len(x) for x in matrices)


@pytest.mark.slow
@pytest.mark.as_users_compile
def test_no_weight_is_moved_in_the_loop(monkeypatch, in_tiles):
  """The loop multiplies by weights of layers, tiles and heads where they lie,
  of which a pass of SSD's asks one head or all; stacked ones even AR copies."""
  pipe = testing.tiny(8, 3, 3, guidance=3.0, heads=(2, 2))
  params = pipe.params
  kinds = ("copy", "transpose", "slice", "dynamic-slice")
  least = _least_bytes(params["heads"]["vertical"])
  apart = _moves(
      monkeypatch, kinds, pipe, "ssd", least, inference_layout(params))
  least = _least_bytes(params["trunk"]["layers"])
  stacked = _moves(monkeypatch, kinds, pipe, "ar", least, params)
  assert stacked[0] and not apart[0]


def test_a_gpu_reads_unstacked_layers_whole(monkeypatch):
  """There slices are copies as on a CPU, but tiles are not; a TPU reads the
  stack."""
  params = kit.tiny(vocab=8).params
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  found = inference_layout(params)
  assert "layers_0" in found["trunk"] and "tiles" not in found
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert inference_layout(params) is params


def test_prompts_fill_blocks_of_a_gpus_slots(monkeypatch):
  """Longer prompts there, with the same tokens; elsewhere as they are."""
  assert layouts_lib.prompt_slots(10, 100, "cpu") == 10
  assert layouts_lib.prompt_slots(10, 100, "gpu") == 28
  assert layouts_lib.prompt_slots(28, 100, "gpu") == 28
  pipe = kit.tiny(3, 3, vocab=5)
  decoder = registry.parse("ar")
  assert pipe.programs.prompt_slots(decoder, 8) == 8
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert pipe.programs.prompt_slots(decoder, 8) == 64 - 9


@pytest.mark.slow
def test_padded_prompts_generate_the_same(monkeypatch):
  """The padding is hidden, in a batch and in a stream that widens."""
  pipe = testing.tiny(7, 3, 3, guidance=3.0)
  texts = ["a", "b", "a prompt that is longer than those before it", "c"]
  plain = pipe.generate(texts, "ar", batch=2)
  monkeypatch.setattr(
      layouts_lib, "prompt_slots",
      lambda length, others, platform: length + -(length + others) % 64)
  padded = testing.tiny(7, 3, 3, guidance=3.0)
  np.testing.assert_array_equal(
      padded.generate(texts, "ar", batch=2).tokens, plain.tokens)
  for image in padded.stream(texts, "ar", batch=2):
    np.testing.assert_array_equal(image.tokens, plain.tokens[image.index])
