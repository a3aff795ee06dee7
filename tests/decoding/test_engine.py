"""The loop, autoregressive decoding, and what every decoder inherits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.types import Queries
from ssd_jax.decoding import engine
from ssd_jax.decoding.ar import AR
from ssd_jax.models import generator as generator_lib
from ssd_jax.pipeline import testing

PROMPTS = ["a", "longer text", "b", "wor"]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "eol"])
def pipe(request):
  return testing.tiny(
      vocab=5, rows=3, cols=4, end_of_row=request.param, guidance=2.0)


@pytest.mark.quick(1)
def test_cached_and_uncached_forwards_agree(pipe, monkeypatch):
  """The pass over the cache equals the forward of training to 1e-5, and so does
  a prompt that is read in chunks."""
  generator, params = pipe.family.generator, pipe.params
  prompt, _ = pipe.family.encode_prompts(["a", "longer"], True)
  key = jax.random.key(3)
  tokens = pipe.sequence(jax.random.randint(key, (4, 3, 4), 0, 5))
  full = generator.hidden(params, prompt, tokens)
  hidden, cache = generator.prefill(params, prompt)
  states = [hidden]
  monkeypatch.setattr(generator_lib, "_CHUNK", 3)
  assert prompt.tokens.shape[1] > 6
  chex.assert_trees_all_close(
      jax.jit(generator.prefill)(params, prompt), (hidden, cache), atol=1e-5)
  length = tokens.shape[1]
  for first, last in [(0, 1), (1, 4), (4, length - 1)]:
    slots = jnp.broadcast_to(jnp.arange(first, last), (4, last - first))
    queries = Queries(
        tokens[:, first:last], slots, slots,
        jnp.arange(length) <= slots[..., None])
    hidden, cache = generator.forward(params, cache, prompt, queries)
    states += list(jnp.moveaxis(hidden, 1, 0))
  np.testing.assert_allclose(jnp.stack(states, 1), full, atol=1e-5)


def test_shapes_and_counts(pipe):
  """AR's passes are the tokens; each token becomes final in its own pass."""
  out = pipe.generate(PROMPTS, num_images=2, batch=3)
  chex.assert_shape(out.tokens, (8, 3, 4))
  chex.assert_shape(out.images, (8, 6, 8, 3))
  assert out.images.dtype == np.uint8
  assert (out.passes == 12).all()
  np.testing.assert_array_equal(
      out.commit_pass, np.broadcast_to(np.arange(12).reshape(3, 4) + 1,
                                       (8, 3, 4)))
  assert out.tokens.min() >= 0 and out.tokens.max() < 5


@pytest.mark.quick(1)
def test_same_seed_same_images_however_batched(pipe):
  """Batch 1 equals batch 3, and another seed differs."""
  one, three, other = (pipe.generate(PROMPTS, seed=s, batch=b)
                       for s, b in ((1, 1), (1, 3), (2, 3)))
  np.testing.assert_array_equal(one.tokens, three.tokens)
  np.testing.assert_array_equal(one.images, three.images)
  assert not np.array_equal(one.tokens, other.tokens)
  # An image depends on its prompt and index, not on who is in its batch.
  company = pipe.generate(["x", PROMPTS[1], "else"], seed=1, batch=3).tokens
  np.testing.assert_array_equal(company[1], one.tokens[1])


def test_one_trace_per_configuration(pipe):
  """Prompts, seeds and scales recompile nothing."""
  chex.clear_trace_counter()
  counted = chex.assert_max_traces(pipe.model.logits, n=2)
  model = pipe.model.__class__(**{**pipe.model.__dict__, "logits": counted})
  for seed, text, guidance, k in ((0, "a", 2.0, 3), (1, "bcd", 5.0, 2)):
    settings, guided = pipe.sampling(guidance=guidance, top_k=k)
    prompt, _ = pipe.family.encode_prompts([text], guided)
    engine.decode(model, AR(), pipe.params, prompt, settings,
                  jax.random.key(seed), jnp.arange(1))


def test_trace_records_every_pass(pipe):
  """History holds the tokens after each pass, up to the last."""
  out = pipe.generate(["a"], trace=True)
  np.testing.assert_array_equal(out.history[0, out.passes[0] - 1],
                                out.tokens[0])
  first = out.history[0, 0]
  np.testing.assert_array_equal(first[0, 0], out.tokens[0, 0, 0])


@pytest.mark.parametrize("setting,value", [
    ("temperature", -1.0), ("top_k", -3), ("top_p", 0.0), ("top_p", 1.5),
    ("guidance", float("nan")), ("colour", 1.0)])
def test_bad_settings_end_in_one_line(pipe, setting, value):
  """What a user gets wrong says what was got and expected."""
  with pytest.raises(UserError, match="Expected .*got") as error:
    pipe.generate(["a"], **{setting: value})
  assert "\n" not in str(error.value)
