"""Spatial heads: equation 2, which token predicts which, and what is
refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError, from_config_dict
from ssd_jax.models.fingerprint import fingerprint, same_trunk
from ssd_jax.models.spatial_heads import (
  HeadsConfig,
  HeadsOptions,
  SpatialHeads,
  bind_heads,
)
from ssd_jax.pipeline import model_folder, testing


@pytest.fixture(scope="module")
def pipe():
  return testing.tiny(vocab=5, rows=3, cols=4, end_of_row=True)


def make_heads(pipe, options=HeadsOptions(3, 2)):
  """(heads, params of trunk and heads)."""
  generator = pipe.family.generator
  heads = SpatialHeads(
      generator, HeadsConfig.make(generator, options, pipe.params)
  )
  weights = heads.init(jax.random.key(1))
  return heads, {**pipe.params, "heads": weights}


def some_cells(shape=(2, 6)):
  """(hidden states, tokens)."""
  hidden = jax.random.normal(jax.random.key(2), (*shape, 16))
  return hidden, jax.random.randint(jax.random.key(3), shape, 0, 5)


def test_a_head_is_equation_2(pipe):
  """u + W2 (silu(W1 v) * W3 v), v = norm(u), u = W0 [h; e], inner width 2 d."""
  heads, params = make_heads(pipe)
  hidden, tokens = some_cells()
  weights = {k: np.float64(v) for k, v in params["heads"]["vertical"].items()}
  assert weights["w1"].shape == (2, 16, 32)
  embedding = heads.generator.embed(params, tokens)
  z = np.concatenate([hidden, embedding], -1).astype(np.float64)
  for offset in (1, 2):
    w = {k: v[offset - 1] for k, v in weights.items()}
    u = z @ w["w0"]
    v = u / np.sqrt(np.mean(u**2, -1, keepdims=True) + 1e-5) * w["scale"]
    gate = v @ w["w1"]
    expected = u + (gate / (1 + np.exp(-gate)) * (v @ w["w3"])) @ w["w2"]
    got = heads.predict(params, "vertical", hidden, tokens, offset)[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(
        heads.draft(params, "vertical", offset, hidden, tokens),
        heads.generator.logits(params, jnp.float32(expected)), atol=1e-4,
    )


def test_one_einsum_runs_all_offsets(pipe):
  """All offsets together are each one alone."""
  heads, params = make_heads(pipe)
  hidden, tokens = some_cells()
  together = heads.draft(params, "horizontal", None, hidden, tokens)
  assert together.shape == (3, 2, 6, 5) and together.dtype == jnp.float32
  for offset in (1, 2, 3):
    alone = heads.draft(params, "horizontal", offset, hidden, tokens)
    np.testing.assert_allclose(together[offset - 1], alone, atol=1e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("inputs, target", [
    ("h", "pre"), ("h+e", "post"), ("e", "embedding"), ("h+e", "token"),
    ("h+e", "distribution")])
def test_stored_heads_draft_as_they_were_trained(
    pipe, tmp_path, inputs, target
):
  """heads.json brings back inputs and target; the loaded model obeys it."""
  heads, params = make_heads(pipe, HeadsOptions(1, 1, inputs, target))
  model_folder.write_extra(
      tmp_path / "heads", "heads", heads.cfg, params["heads"], np.float32)
  cfg, weights = model_folder.read_extra(tmp_path / "heads", "heads")
  assert cfg == heads.cfg
  model = bind_heads(heads.generator, cfg, {**params, "heads": weights})
  hidden, tokens = some_cells()
  draft = functools.partial(
      model.draft, direction="vertical", offset=1, hidden=hidden,
      tokens=tokens)
  np.testing.assert_allclose(
      draft({**params, "heads": weights}),
      heads.logits(params, heads.predict(
          params, "vertical", hidden, tokens))[0], rtol=1e-5)


def test_bound_model_drafts(pipe):
  """The model has the heads' counts and function and is otherwise the same."""
  heads, params = make_heads(pipe)
  model = bind_heads(heads.generator, heads.cfg, params)
  assert model.heads == (3, 2)
  assert model.draft(
      params, "vertical", 2, jnp.zeros((2, 16)), jnp.zeros(2, jnp.int32)
  ).shape == (2, 5)
  assert dataclasses.replace(
      model, draft=type(model).draft, heads=(0, 0)
  ) == heads.generator.model()


def test_heads_of_another_model_are_refused(pipe):
  """Another trunk, grid or offset set: one clear line each."""
  heads, params = make_heads(pipe)
  other = testing.tiny(vocab=5, rows=3, cols=4, end_of_row=True, seed=1)
  mixed = {**other.params, "heads": params["heads"]}
  with pytest.raises(UserError, match="another trunk's weights"):
    bind_heads(other.family.generator, heads.cfg, mixed)
  no_ends = testing.tiny(vocab=5, rows=3, cols=4)
  with pytest.raises(
      UserError, match="for a 3x4 grid, got .* 3x4 grid with end-of-row"):
    bind_heads(no_ends.family.generator, heads.cfg)
  fewer = dataclasses.replace(heads.cfg, options=HeadsOptions(2, 2))
  with pytest.raises(UserError, match="other offsets"):
    bind_heads(heads.generator, fewer, params)
  with pytest.raises(UserError, match="at least one head"):
    HeadsOptions(0, 0)
  with pytest.raises(UserError, match="target"):
    HeadsOptions(target="pixels")


def test_settings_survive_json(pipe):
  """What is stored beside the weights reads back the same."""
  heads, _ = make_heads(pipe)
  stored = dataclasses.asdict(heads.cfg)
  assert from_config_dict(HeadsConfig, stored) == heads.cfg


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_trunk_is_known_again_after_rounding(pipe, dtype):
  """Stored in 16 bits it is the same trunk; after a change of 2% it is not."""
  trunk = pipe.params["trunk"]
  own = fingerprint(trunk)
  rounded = jax.tree.map(lambda x: x.astype(dtype), trunk)
  assert same_trunk(own, fingerprint(rounded))
  changed = jax.tree.map(lambda x: 1.02 * x, trunk)
  assert not same_trunk(own, fingerprint(changed))
