"""Weights in int8: how near they come, their bytes, where they are refused."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssd_jax
from ssd_jax.core.config import UserError
from ssd_jax.models import quantization
from ssd_jax.pipeline import testing
from ssd_jax.runtime import sharding

MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "head", "w0", "w1", "w2",
            "w3")


def packed(pipe):
  """The pipeline with trunk and heads in int8, its drafter as it was."""
  own = {k: pipe.params[k] for k in ("trunk", "heads")}
  return dataclasses.replace(
      pipe, params={**pipe.params, **quantization.quantize(own)})


@pytest.fixture(scope="module")
def pipe():
  return testing.tiny(
      vocab=16, rows=3, cols=4, end_of_row=True, heads=(2, 1), guidance=2.0)


@pytest.fixture(scope="module")
def small(pipe):
  return packed(pipe)


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_each_weight_is_within_half_a_step(pipe, small):
  """Matrices, and they alone, are bytes with a scale per output channel."""
  found = set()
  for kind in ("trunk", "heads"):
    floats = jax.tree_util.tree_leaves_with_path(pipe.params[kind])
    again = jax.tree.leaves(quantization.dequantize(small.params[kind]))
    for (path, w), near in zip(floats, again, strict=True):
      name = path[-1].key
      if not np.array_equal(w, near):
        found.add(name)
        axes = (1, 2) if name == "o" else -3 if name in "qkv" else -2
        step = np.abs(w).max(axes, keepdims=True) / 127
        assert (np.abs(w - near) <= step * 0.501).all(), name
  assert found == set(MATRICES)
  assert not quantization.is_quantized(pipe.params)


@pytest.mark.slow
def test_logits_stay_near_and_bytes_are_a_quarter():
  """The embedded model: logits within 5% of their spread, heads as well."""
  pipe = ssd_jax.load("emoji")
  small = ssd_jax.load("emoji", int8=True)
  layers = lambda p: p.params["trunk"]["layers"]
  assert size(layers(small)) < 0.26 * size(layers(pipe))
  assert size(small.params["heads"]) < 0.26 * size(pipe.params["heads"])
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(8, 256)), jnp.float32)
  codes = jnp.arange(8)
  generator = pipe.family.generator
  prompt, _ = pipe.family.encode_prompts(["red heart"], True)
  sequence = jnp.asarray(rng.integers(0, 1024, (2, 256)))

  @jax.jit
  def logits(params):
    states = generator.hidden(params, prompt, sequence)
    return (generator.logits(params, states),
            pipe.model.draft(params, "horizontal", 1, hidden, codes),
            pipe.model.draft(params, "vertical", 1, hidden, codes))

  for exact, near in zip(logits(pipe.params), logits(small.params),
                         strict=True):
    assert jnp.std(exact - near) < 0.05 * jnp.std(exact)


@pytest.mark.slow
def test_all_functions_read_the_same_weights(small):
  """Greedily, what is lossless generates AR's images, drafting heads or not."""
  draw = lambda decoder: small.generate(
      ["a", "b"], decoder, batch=2, temperature=0.0).tokens
  expected = draw("ar")
  assert len(np.unique(expected)) > 2
  for decoder in ("sjd:window=3", "exact"):
    np.testing.assert_array_equal(draw(decoder), expected)


def test_refused_where_it_cannot_work(small, tmp_path, monkeypatch):
  """Twice, in a folder, cut over devices, without the extra: one line each."""
  with pytest.raises(UserError, match="got weights in int8"):
    quantization.quantize(small.params)
  loaded = dataclasses.replace(small, folders={"model": tmp_path})
  with pytest.raises(UserError, match="got a pipeline in int8"):
    loaded.save(tmp_path / "new")
  monkeypatch.setattr(sharding, "num_param_shards", lambda: 2)
  with pytest.raises(UserError, match="int8.*--mesh data"):
    ssd_jax.load("emoji", int8=True)
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(UserError, match=r"pip install 'ssd-jax\[int8\]'"):
    quantization.quantize({})
