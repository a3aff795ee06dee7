"""Saving a pipeline as the model folder that `ssd_jax.load` reads."""

import os
import pathlib
import shutil
import tempfile
from typing import TYPE_CHECKING

import flax.core

from ssd_jax.core.config import UserError, check
from ssd_jax.models import quantization
from ssd_jax.storage import checkpoints, model_settings
from ssd_jax.storage.files import real_path

if TYPE_CHECKING:
  from ssd_jax.pipeline.pipeline import Pipeline

_WEIGHTS = ("trunk", "vq", "heads", "drafter")


def save(pipe: "Pipeline", folder: str | os.PathLike) -> None:
  """Writes a pipeline's parameters, in their dtype, as a model folder.

  The family's settings and its text tokenizer are copied from the folder that
  the pipeline was loaded from.

  Args:
    pipe: A `Pipeline` that was loaded from a folder.
    folder: The new model folder; must not exist. It appears by one rename.

  Raises:
    UserError: if the pipeline was not loaded from a folder or is in int8, or
      `folder` exists.
  """
  check(isinstance(folder, (str, os.PathLike)), "folder", repr(folder),
        "the name of a new folder")
  folder = real_path(folder)
  if "model" not in pipe.folders:
    raise UserError(
        "Expected a pipeline loaded from a folder, got a pipeline that "
        "was not. Write its params with checkpoints.save.")
  if quantization.is_quantized(pipe.params):
    raise UserError(
        "Expected float parameters, got a pipeline in int8. Load "
        "the model without int8 to save it.")
  if folder.exists():
    raise UserError(
        f"Expected a new folder, got {folder}, which exists. Choose another "
        "name or remove it.")
  folder.parent.mkdir(parents=True, exist_ok=True)
  staging = pathlib.Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
  try:
    new = staging / "new"
    shutil.copytree(pipe.folders["model"], new,
                    ignore=lambda at, names: _left_out(pipe, at, names))
    params = flax.core.unfreeze({**pipe.params, "vq": pipe.vq_params})
    for kind in ("trunk", "vq"):
      if params[kind] is None:  # tokens that are not codes of pixels
        continue
      checkpoints.save(new / kind, params[kind])
    settings = model_settings.read(new / "model.json")
    if "tokenizer" in settings:
      settings["tokenizer"] = checkpoints.identity(new / "vq")
      model_settings.write(new / "model.json", settings)
    for kind in params.keys() & {"heads", "drafter"}:
      checkpoints.save(new / kind / "weights", params[kind])
      shutil.copy2(pipe.folders[kind] / f"{kind}.json", new / kind)
    os.rename(new, folder)
  finally:
    shutil.rmtree(staging, ignore_errors=True)


def _left_out(pipe: "Pipeline", at: str, names: list[str]) -> list[str]:
  """Returns names not to copy: files that are written, and their report."""
  is_top = pathlib.Path(at) == pipe.folders["model"]
  return [n for n in names if is_top and n in (*_WEIGHTS, "report.json")]
