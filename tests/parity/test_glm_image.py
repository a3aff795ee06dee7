"""GLM-Image, converted from its published layout, against transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import ssd_jax
from ssd_jax.convert import convert, glm_image as recipes
from ssd_jax.pipeline import preview
from tests.parity.glm_image import Reference
from tests.parity.references import TEXTS
from tests.support.toy_families import glm_image_config
from tests.support.toy_weights import CODES


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """(reference, pipeline)."""
  folder = tmp_path_factory.mktemp("glm_image")
  reference = Reference()
  source = folder / "source"
  source.mkdir()
  reference.save(source)
  job = convert.open_job(
      recipes.recipe(glm_image_config()), {"source": source}, "float32")
  convert.convert(job, folder / "model")
  return reference, ssd_jax.load(folder / "model")


def test_prompts_and_logits_of_both_grids(case):
  """Prompts are the original's to the id, logits its to 1e-4 of the spread."""
  reference, pipe = case
  generator = pipe.family.generator
  rng = np.random.default_rng(0)
  small, large = (rng.integers(0, CODES, shape)
                  for shape in ((2, 1, 2), (2, 2, 3)))
  prompt, _ = pipe.family.encode_prompts(list(TEXTS), False)
  theirs = [reference.prompt(text) for text in TEXTS]
  for ours, mask, ids in zip(prompt.tokens, prompt.mask, theirs):
    assert ours[mask].tolist() == ids
  wanted = np.stack([
      reference.logits(ids, [*a.ravel(), *b.ravel()])[:-1]
      for ids, a, b in zip(theirs, small, large)])
  first = preview.model_of(pipe.model)

  of_small = dataclasses.replace(generator, grid=first.grid)
  run = lambda g, prompt, tokens: np.asarray(g.logits(pipe.params, g.hidden(
      pipe.params, prompt, jnp.asarray(tokens.reshape(2, -1)))))
  ours = np.concatenate([
      run(of_small, prompt, small),
      run(generator, preview.extend(prompt, pipe.model, small), large)], 1)
  error = np.abs(ours - wanted).max() / wanted.std()
  print(f"\nlogits of both grids: {error:.1e} of their spread")
  assert error < 1e-4


def test_greedy_tokens_of_both_grids(case):
  """Both grids are those of the model's own generate."""
  reference, pipe = case
  out = pipe.generate(list(TEXTS), "ar", temperature=0.0)
  for i, text in enumerate(TEXTS):
    ours = [*out.preview[i].ravel(), *out.tokens[i].ravel()]
    assert ours == reference.greedy(reference.prompt(text))
  assert (out.passes == 8).all() and out.commit_pass.max() == 8
