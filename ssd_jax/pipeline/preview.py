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
from ssd_jax.pipeline.programs import Programs
from ssd_jax.pipeline.run import Run
from ssd_jax.runtime import sharding

_BRANCH = 2**32 - 2  # of a call's key; images have smaller numbers


@functools.cache
def model_of(model: Model) -> Model:
  """Returns the model of the preview's grid.

  Args:
    model: Functions of the image's grid, with a preview.
  """
  assert model.preview is not None
  fewer = model.preview.length - model.grid.length

  def prefill(params, prompt, scratch):
    return model.prefill(params, prompt, scratch + fewer)

  return dataclasses.replace(
      model, grid=model.preview, preview=None, prefill=prefill,
      drafter=model.drafter and model.drafter.preview)


def run_of(run: Run, programs: Programs) -> Run:
  """Returns what generates previews, on the clock of `run`.

  Args:
    run: What generates the images.
    programs: Programs of whole images.
  """
  first = Run(programs.on_model(model_of(programs.model)), run.decoder)
  first.clock = run.clock
  return first


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

  If they have drafts, those of the image become the previews' tokens.

  Args:
    prompt: Encoded prompts of B images.
    model: Functions of the image's grid.
    preview_BRC: int32 [B, R, C], tokens of the previews.
  """
  if prompt.draft is not None:
    prompt = with_drafts(prompt, model.grid, upsampled(preview_BRC, model.grid))
  return completion.extend(prompt, model_of(model), preview_BRC)


def without_drafts(prompt: Prompt) -> Prompt:
  """Returns prompts that have drafts, of no slot yet."""
  return prompt.replace(  # type: ignore[attr-defined]
      draft=jnp.full_like(prompt.positions, -1))


def with_drafts(prompt: Prompt, grid: Grid, tokens_BRC: np.ndarray) -> Prompt:
  """Returns prompts with first drafts of the image.

  Args:
    prompt: Encoded prompts of B images.
    grid: The image as a sequence, the end of what the prompts' positions cover.
    tokens_BRC: int32 [B, R, C], the drafts.
  """
  batch = len(tokens_BRC)
  streams = prompt.positions.shape[0] // batch
  slots = prompt.positions.shape[1] - grid.length + grid.slot_of.ravel()
  draft = np.full(prompt.positions.shape, -1, np.int32)
  draft[:, slots] = np.tile(tokens_BRC.reshape(batch, -1), (streams, 1))
  return prompt.replace(draft=jnp.asarray(draft))  # type: ignore[attr-defined]


def upsampled(preview_BRC: np.ndarray, grid: Grid) -> np.ndarray:
  """Returns the preview's token at the centre of each of the image's.

  >>> upsampled(np.array([[[1, 2]]]), Grid(2, 3)).tolist()
  [[[1, 2, 2], [1, 2, 2]]]

  Args:
    preview_BRC: int32 [B, r, c].
    grid: The image as a sequence.

  Returns:
    int32 [B, R, C].
  """
  rows, cols = preview_BRC.shape[1:]
  nearest = lambda few, many: (2 * np.arange(many) + 1) * few // (2 * many)
  row_R, col_C = nearest(rows, grid.rows), nearest(cols, grid.cols)
  return preview_BRC[:, row_R[:, None], col_C]


def check_one_grid(grid: Grid | None, what: str) -> None:
  """Raises UserError for what a model with a preview does not do."""
  if grid is not None:
    raise UserError(
        f"Expected a model of one grid for {what}, got one that generates a "
        "preview first. Use generate without it.")
