"""Toy families, converted, against arrays that PyTorch computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.convert import convert
from ssd_jax.convert.checkpoint_files import Checkpoint
from ssd_jax.convert.registry import RECIPES
from ssd_jax.families.published import left_padded
from ssd_jax.models.t5 import T5Config, T5Encoder
from ssd_jax.pipeline import preview
from ssd_jax.pipeline.model_folder import FAMILIES
from ssd_jax.storage import checkpoints
from ssd_jax.storage.files import read_json
from tests.support import ROOT
from tests.support.toy_families import CONFIGS, glm_image_config
from tests.support.toy_weights import InMemory

_TRUNK_ALONE = ("emu3_5", "liquid", "lumina2")  # tests/parity has the rest
_GOLDEN = np.load(ROOT / "tests" / "golden" / "families.npz")


@pytest.fixture(params=CONFIGS, scope="module")
def case(request, tmp_path_factory):
  """(name, family, folder of the converted model)."""
  config = CONFIGS[request.param]()
  recipe = RECIPES[config.family](config)
  # One published layout stores a norm per head, the other one for all.
  shape = lambda s: (
      s.others[0] if request.param == "anole_hf" and s.others else s.shape)
  # Heads that may be tied are; their tensors are not in the files.
  parts = tuple(part.resolved(part.required) for part in recipe.parts)
  if request.param in _TRUNK_ALONE:
    parts = parts[:1]
  recipe = dataclasses.replace(recipe, parts=parts)
  found = tuple(
      Checkpoint({s.name: InMemory(s.name, shape(s)) for row in part.table.rows
                  for s in row.sources}, ()) for part in recipe.parts)
  out = tmp_path_factory.mktemp(request.param) / "model"
  convert.convert(convert.Job(recipe, found, (), "float32"), out)
  family = FAMILIES[config.family](
      read_json(out / "model.json"), out)
  return request.param, family, out


def _spread_error(ours, theirs):
  return np.abs(np.asarray(ours) - theirs).max() / theirs.std()


def test_logits_of_both_streams(case):
  """Converted trunks have the original's logits at every slot."""
  name, family, out = case
  golden = {key: _GOLDEN[f"{name}/{key}"] for key in (
      "tokens", "cond", "uncond", "cond_logits", "uncond_logits")}
  if name == "llamagen_text":
    features = _GOLDEN[f"{name}/features"]
    prompt = family.from_features(
        features, np.ones(features.shape[:2], bool), guided=True)
  elif name == "llamagen_class":
    prompt, _ = family.encode_prompts(["3"], guided=True)
  else:
    prompt = left_padded([golden["cond"], golden["uncond"]],
                         family.grid.length)
  params = {"trunk": checkpoints.restore(out / "trunk")}
  generator = family.generator
  logits = jax.jit(lambda params, *args: generator.logits(
      params, generator.hidden(params, *args)))
  ours = logits(params, prompt, jnp.asarray(np.stack([golden["tokens"]] * 2)))
  theirs = np.stack([golden["cond_logits"], golden["uncond_logits"]])
  assert _spread_error(ours, theirs) < 1e-4


def test_pixels_and_codes(case):
  """Converted tokenizers generate the original's pixels and read its codes."""
  name, family, out = case
  if name in ("anole", "anole_hf", "llamagen_text", *_TRUNK_ALONE):
    return  # much the same network as another family's
  params = {"params": checkpoints.restore(out / "vq")}
  theirs = _GOLDEN[f"{name}/pixels"].transpose(0, 2, 3, 1)
  rng = np.random.default_rng(0)
  rng.integers(0, 32, family.grid.length)
  ids = rng.integers(0, 32, (1, family.grid.rows, family.grid.cols))
  apply = jax.jit(family.vq.apply, static_argnames="method")
  ours = apply(params, jnp.asarray(ids), method="decode")
  assert _spread_error(ours, theirs) < 1e-4
  latents = apply(params, jnp.tanh(theirs), method="encode")
  codes = apply(params, latents, method="quantize")
  assert np.array_equal(codes, _GOLDEN[f"{name}/codes"])


def test_features_of_captions(case):
  """The converted T5 encoder has the original's features."""
  name, family, out = case
  if name != "llamagen_text":
    return
  ids = np.zeros((1, 12), np.int32)
  given = _GOLDEN[f"{name}/cond"]
  ids[0, :len(given)] = given
  encoder = T5Encoder(T5Config(**family.config.t5.to_dict()))
  ours = encoder.apply({"params": checkpoints.restore(out / "text")},
                       jnp.asarray(ids), jnp.asarray(ids != 0))
  theirs = _GOLDEN[f"{name}/features"]
  assert _spread_error(ours[:, :len(given)], theirs) < 1e-4


def test_logits_of_an_image_after_its_preview(tmp_path):
  """A converted GLM-Image has transformers' logits in its second grid."""
  config = glm_image_config()
  recipe = RECIPES["glm_image"](config)
  found = tuple(
      Checkpoint({s.name: InMemory(s.name, s.shape) for row in part.table.rows
                  for s in row.sources}, ()) for part in recipe.parts)
  convert.convert(convert.Job(recipe, found, (), "float32"), tmp_path / "model")
  params = {"trunk": checkpoints.restore(tmp_path / "model" / "trunk")}
  generator = FAMILIES["glm_image"](
      read_json(tmp_path / "model" / "model.json"), None).generator
  ids = _GOLDEN["glm_image/prompt"]
  tokens, theirs = (_GOLDEN[f"glm_image/{key}"] for key in ("tokens", "logits"))
  prompt = left_padded([ids], 8)
  first = len(generator.rope) - 8 - prompt.tokens.shape[1]
  prompt = dataclasses.replace(prompt, positions=jnp.arange(
      first, len(generator.rope))[None])
  prompt = preview.extend(prompt, generator.model(), tokens[None, None, :2])
  ours = jax.jit(lambda params, *args: generator.logits(
      params, generator.hidden(params, *args)))(
          params, prompt, jnp.asarray(tokens[None, 2:]))
  assert _spread_error(ours[0], theirs[2:]) < 1e-4
