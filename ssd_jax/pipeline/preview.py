"""Images with a preview: a small grid that is generated first.

The finished preview becomes part of the prompt of the image, as given rows do
(`completion`). Each grid is decoded as any other, so a decoder that is lossless
on one grid is lossless on the pair.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Model, Prompt
from ssd_jax.decoding import engine
from ssd_jax.decoding.engine import Decoded
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.pipeline import completion
from ssd_jax.pipeline.run import Run
from ssd_jax.runtime import sharding

_BRANCH = 2**32 - 2  # of a call's key; images have smaller numbers


@functools.cache
def model_of(model: Model) -> Model:
  """Returns the model of the preview's grid, without spatial heads' drafter.

  Args:
    model: Functions of the image's grid, with a preview.
  """
  assert model.preview is not None
  fewer = model.preview.length - model.grid.length

  def prefill(params, prompt, scratch):
    return model.prefill(params, prompt, scratch + fewer)

  return dataclasses.replace(
      model, grid=model.preview, preview=None, prefill=prefill, drafter=None)


def generate(
    run: Run, prompt: Prompt, settings: Sampling, seed: int, index_B: np.ndarray
) -> Decoded:
  """Generates the previews of a batch.

  Args:
    run: Programs of the preview's grid.
    prompt: Encoded prompts.
    settings: Settings of the target distribution.
    seed: Seed of the call; the previews' noise differs from the images'.
    index_B: Index of each image over the whole call.
  """
  key = jax.random.fold_in(jax.random.key(seed), jnp.uint32(_BRANCH))
  prompt = run.place(run.prepare(prompt, None))
  return sharding.fetch(run(engine.decode, prompt, settings, key, index_B))


def extend(prompt: Prompt, model: Model, preview_BRC: np.ndarray) -> Prompt:
  """Returns prompts that end with finished previews.

  Args:
    prompt: Encoded prompts of B images.
    model: Functions of the image's grid.
    preview_BRC: int32 [B, R, C], tokens of the previews.
  """
  return completion.extend(prompt, model_of(model), preview_BRC)


def check_one_grid(grid: Grid | None, what: str) -> None:
  """Raises UserError for what a model with a preview does not do."""
  if grid is not None:
    raise UserError(
        f"Expected a model of one grid for {what}, got one that generates a "
        "preview first. Use generate without it.")
