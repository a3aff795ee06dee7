"""Decodes semantic image tokens to images, with `diffusers`.

GLM-Image's tokens are the input of a diffusion transformer. The user's
`GlmImagePipeline` paints them; its own autoregressive stage is not loaded.
"""

import json
import os
import re
from typing import Any

import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.extras import need
from ssd_jax.core.outputs import Output
from ssd_jax.families.glm_image import PIXELS, prior_ids
from ssd_jax.storage.files import user_path

_CLASS = "GlmImagePipeline"
_EXTRA = "diffusers"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_EXPECTED = f"a folder of diffusers' {_CLASS} or ORG/NAME of one"


def paint(
    output: Output, painter: Any, seed: int = 0, **settings: Any
) -> np.ndarray:
  """Decodes generated tokens to images.

  Args:
    output: What `Pipeline.generate` returned.
    painter: A `diffusers.GlmImagePipeline`, or the name of one; see `load`.
    seed: Seed of the noise; each image has its own, however many are painted.
    **settings: Arguments of the pipeline's call, such as num_inference_steps.

  Returns:
    uint8 [B, H, W, 3].

  Raises:
    UserError: if the output has images already, or the pipeline is not there.
  """
  check(not output.images.size, "output", "images",
        "tokens that another model paints, such as GLM-Image's")
  if isinstance(painter, (str, os.PathLike)):
    painter = load(painter)
  return np.stack([
      paint_grid(painter, prompt, tokens, seed, int(index), **settings)
      for prompt, tokens, index in zip(
          output.prompts, output.tokens, output.index, strict=True)])


def paint_grid(
    painter: Any, prompt: str, tokens_RC: np.ndarray, seed: int, index: int,
    **settings: Any,
) -> np.ndarray:
  """Paints one grid, uint8 [H, W, 3]; see `paint`.

  Args:
    painter: A `diffusers.GlmImagePipeline`.
    prompt: Its words in quotation marks are drawn as letters.
    tokens_RC: Image tokens.
    seed: Seed of the call.
    index: Index of the image over the whole call; keys its noise.
    **settings: Arguments of the pipeline's call.
  """
  torch = need("torch", _EXTRA)
  rows, cols = tokens_RC.shape
  entropy = np.random.SeedSequence((seed, index)).generate_state(1)
  images = painter(
      prompt=prompt, prior_token_ids=torch.from_numpy(
          prior_ids(tokens_RC[None])).to(painter.device),
      height=rows * PIXELS, width=cols * PIXELS,
      generator=torch.Generator("cpu").manual_seed(int(entropy[0])),
      **settings).images
  return np.asarray(images[0].convert("RGB"))


def check_painter(name: str | os.PathLike) -> str:
  """Returns the folder or repository that a name means; loads nothing.

  Args:
    name: A folder, ORG/NAME or hf:ORG/NAME.

  Raises:
    UserError: if there is no such folder, it holds another pipeline, or the
      extra is missing.
  """
  folder = user_path(name)
  source = os.fspath(name).removeprefix("hf:")
  if folder.is_dir():
    found = _class_in(folder / "model_index.json")
    check(found == _CLASS, "painter", f"{name} with {found}", _EXPECTED)
    source = str(folder)
  else:
    is_name = _REPOSITORY.fullmatch(source) is not None
    check(is_name, "painter", name, _EXPECTED)
  for module in ("torch", "transformers"):
    need(module, _EXTRA)
  library = need("diffusers", _EXTRA)
  if not hasattr(library, _CLASS):
    raise UserError(
        f"Expected a diffusers with {_CLASS}, got {library.__version__}. Run "
        f"pip install -U 'ssd-jax[{_EXTRA}]'.")
  return source


def load(name: str | os.PathLike) -> Any:
  """Loads a `diffusers.GlmImagePipeline` without its autoregressive stage.

  It is in bfloat16 on a GPU that PyTorch has, else in float32 on the CPU.

  Args:
    name: As for `check_painter`; a repository is downloaded.

  Raises:
    UserError: if it cannot be read.
  """
  source = check_painter(name)
  torch, library = need("torch", _EXTRA), need("diffusers", _EXTRA)
  on_gpu = torch.cuda.is_available()
  try:
    painter = getattr(library, _CLASS).from_pretrained(
        source, vision_language_encoder=None, processor=None,
        dtype=torch.bfloat16 if on_gpu else torch.float32)
  except (OSError, ValueError, RuntimeError) as error:
    reason = " ".join(str(error).split())[:120]
    raise UserError(
        f"Expected {_EXPECTED}, got {name} ({reason}). Check the name and the "
        "network.") from error
  return painter.to("cuda") if on_gpu else painter


def _class_in(file: os.PathLike) -> str:
  """Returns the class that a model_index.json names, or what is wrong."""
  try:
    with open(file, encoding="utf-8") as stream:
      return str(json.load(stream).get("_class_name"))
  except (OSError, ValueError, AttributeError):
    return "no readable model_index.json"
