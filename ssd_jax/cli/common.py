"""Flags and first steps that the commands which draw pictures share."""

import os
import pathlib

from absl import flags

from ssd_jax.cli import config_overrides, run as cli
from ssd_jax.core.config import UserError
from ssd_jax.decoding.sampling import Overrides
from ssd_jax.pipeline import model_folder
from ssd_jax.pipeline.pipeline import Pipeline

PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "Prompts: UTF-8 text with one per line, or an "
    "official prompt file (GenEval .jsonl, folder of DPG-Bench, COCO captions "
    ".json, PartiPrompts .tsv).")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures per prompt.")
SEED = flags.DEFINE_integer("seed", 0, "Same seed, same pictures.")
BATCH = flags.DEFINE_integer(
    "batch", None, "Pictures drawn together; default: 8, in benchmark 1.")
OUT = flags.DEFINE_string(
    "out", None, "Folder of what is written; default: out, in benchmark bench.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Divides the logits.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Codes kept; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Probability mass kept.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Model folder; default: the config's, else the "
    "embedded model.")
_HEADS = flags.DEFINE_string(
    "heads", None, "Folder of spatial heads; default: the model's own.")
_DRAFTER = flags.DEFINE_string(
    "drafter", None, "Folder of a drafter; default: the model's own.")
_RANDOM_WEIGHTS = flags.DEFINE_bool(
    "random_weights", False, "Random trunk: for trying sizes and speed.")
_INT8 = flags.DEFINE_bool(
    "int8", False, "Keep the matrices of trunk and heads in int8, half or a "
    "quarter of the bytes; needs the extra 'int8'.")
DECODER_FILE = flags.DEFINE_string(
    "decoder_file", None, "Python file with decoders of your own; it is run.")


def load_pipeline() -> Pipeline:
  """The pipeline of the flags: --checkpoint, else the config's, else emoji.

  With --random_weights a published family needs no --checkpoint.

  Raises:
    UserError: when --config is given and names another family.
  """
  config = flags.FLAGS.config
  checkpoint = CHECKPOINT.value or config.get("checkpoint", "")
  heads, drafter = _HEADS.value, _DRAFTER.value
  if config.family != "emoji" and not CHECKPOINT.value:
    if _RANDOM_WEIGHTS.value:
      return model_folder.from_config(config, heads, drafter, _INT8.value)
    model_folder.require(checkpoint, config.family)
  cli.refuse_unused(
      "checkpoint", "sampling", *model_folder.CHOICES.get(config.family, ()))
  pipe = model_folder.load(
      checkpoint or "emoji", random_weights=_RANDOM_WEIGHTS.value,
      choices=config_overrides.choices(config), heads=heads, drafter=drafter,
      int8=_INT8.value)
  config_overrides.check_family(pipe, config)
  return pipe


def sampling() -> Overrides:
  """The flags' settings of the target distribution, None for the model's."""
  return {
      "guidance": _GUIDANCE.value, "temperature": _TEMPERATURE.value,
      "top_k": _TOP_K.value, "top_p": _TOP_P.value,
  }


def writable_folder(path: str) -> pathlib.Path:
  """The output folder, made and seen to be writable before any work.

  Raises:
    UserError: when it is not.
  """
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
        f"got --out {path}, expected a folder that can be made "
        f"({error.strerror}); choose another"
    ) from error
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(
        f"got --out {path}, expected a folder that can be written; change its "
        "permissions or choose another"
    )
  return folder
