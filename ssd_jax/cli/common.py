"""Flags and first steps of the commands that generate images."""

from collections.abc import Callable, Sequence
import os
import pathlib
from typing import Any

from absl import flags
import ml_collections

from ssd_jax.cli import config_overrides, run as cli
from ssd_jax.core.config import UserError
from ssd_jax.decoding.sampling import Overrides
from ssd_jax.pipeline import image_prompts, model_folder, published_models
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.storage.files import user_path

# Flags that several commands read; each command defines those that it reads.
_FLAGS: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "prompts_file": (
        flags.DEFINE_string, None, "Prompts: UTF-8 text with one per line, or "
        "a .csv or .tsv with a header and a column 'prompt', or an official "
        "prompt file (GenEval .jsonl, folder of DPG-Bench, COCO captions "
        ".json, PartiPrompts .tsv)."),
    "num_images": (flags.DEFINE_integer, 1, "Images per prompt."),
    "seed": (
        flags.DEFINE_integer, 0, "Random seed; equal seeds give equal images."),
    "batch": (
        flags.DEFINE_integer, None, "Images per batch; default: 8; 1 in "
        "benchmark and compare, 4 in evidence, serve and demo."),
    "out": (
        flags.DEFINE_string, None, "Output folder; default: out, or bench for "
        "infer.benchmark."),
    "guidance": (flags.DEFINE_float, None, "Guidance scale."),
    "temperature": (flags.DEFINE_float, None, "Sampling temperature."),
    "top_k": (
        flags.DEFINE_integer, None,
        "Sample from the k likeliest tokens; 0 keeps all."),
    "top_p": (flags.DEFINE_float, None, "Nucleus probability; 1 keeps all."),
    "checkpoint": (
        flags.DEFINE_string, None, "Model folder; default: the config's, else "
        "the embedded model."),
    "model": (
        flags.DEFINE_string, None, "Published model: a name, `list` for all "
        "names, hf:ORG/NAME or a model folder. It is downloaded and converted "
        "once. Needs the extras 'hub' and 'text'."),
    "heads": (
        flags.DEFINE_string, None, "Folder of spatial heads; default: the "
        "model's own."),
    "drafter": (
        flags.DEFINE_string, None, "Folder of a drafter; default: the model's "
        "own."),
    "random_weights": (
        flags.DEFINE_bool, False, "Use a random trunk, to try sizes and "
        "speed."),
    "int8": (
        flags.DEFINE_bool, False, "Keep the matrices of trunk and heads in "
        "int8: half or a quarter of the bytes. Needs the extra 'int8'."),
    "decoder_file": (
        flags.DEFINE_string, None, "Python file that defines your own "
        "decoders; it is executed."),
}
SAMPLING = ("guidance", "temperature", "top_k", "top_p")
MODEL = ("checkpoint", "model", "heads", "drafter", "random_weights", "int8")


def define_flags(*names: str) -> None:
  """Defines shared flags, to be called where a command's module is imported.

  Args:
    *names: Names of flags, such as "out" or all of `MODEL`.
  """
  for name in names:
    if name not in flags.FLAGS:  # another command of this process has done so
      define, default, text = _FLAGS[name]
      define(name, default, text)


def model_name() -> str | None:
  """Returns what --model or --checkpoint names, None without them."""
  return flags.FLAGS.model or flags.FLAGS.checkpoint


def load_pipeline(
    pixels: bool = True, images: Sequence[image_prompts.Given] = ()
) -> Pipeline:
  """Loads the pipeline of the flags; see `_load_pipeline`.

  Args:
    pixels: Whether the command needs images, not only their tokens.
    images: Images that prompts will contain; see `model_folder.load`.

  Raises:
    UserError: when the model generates no images.
  """
  pipe = _load_pipeline(images)
  if pixels and not pipe.image_shape[0]:
    raise UserError(
        "Expected a model that generates images, got "
        f"{pipe.family.name}, whose tokens another model decodes. Use "
        "infer.generate.")
  return pipe


def _load_pipeline(images: Sequence[image_prompts.Given]) -> Pipeline:
  """Loads the pipeline of --model or --checkpoint, of the config, else emoji.

  With --random_weights a published family needs no --checkpoint.

  Raises:
    UserError: when --config is given and names another family.
  """
  config = flags.FLAGS.config
  if flags.FLAGS.model and flags.FLAGS.checkpoint:
    raise UserError(
        "Expected one model, got --model and --checkpoint. Leave one out.")
  named = flags.FLAGS.checkpoint or _named_model(images)
  if isinstance(named, Pipeline):
    return named
  checkpoint = named or config.get("checkpoint", "")
  heads, drafter = flags.FLAGS.heads, flags.FLAGS.drafter
  if config.family != "emoji" and not named:
    if flags.FLAGS.random_weights:
      fixed = config_overrides.choices(config)
      return model_folder.from_config(
          model_folder.for_images(config, images, fixed), heads, drafter,
          flags.FLAGS.int8)
    model_folder.require(checkpoint, config.family)
  cli.refuse_unused(
      "checkpoint", "sampling", *model_folder.CHOICES.get(config.family, ()))
  if config_overrides.names_variant():
    config_overrides.check_variant(checkpoint or "emoji", config)
  pipe = model_folder.load(
      checkpoint or "emoji", random_weights=flags.FLAGS.random_weights,
      choices=config_overrides.choices(config), heads=heads, drafter=drafter,
      int8=flags.FLAGS.int8, images=images)
  config_overrides.check_family(pipe, config)
  return pipe


def _named_model(
    images: Sequence[image_prompts.Given]
) -> str | Pipeline | None:
  """Returns the folder of --model, or its pipeline with random weights."""
  name = flags.FLAGS.model
  if not name:
    return None
  known = published_models.find(name)
  if known is None and name != "emoji" and not (
      user_path(name) / "model.json").is_file():
    raise UserError(
        "Expected a model folder or a name that --model list shows, got "
        f"--model {name}. Check its spelling.")
  model_folder.check_images(name, images)
  if known is None or not flags.FLAGS.random_weights:
    return os.fspath(published_models.resolve(name))
  cli.refuse_unused()
  config = published_models.CATALOG[known].config
  return model_folder.from_config(
      model_folder.for_images(config, images), flags.FLAGS.heads,
      flags.FLAGS.drafter, flags.FLAGS.int8)


def sampling() -> Overrides:
  """Returns the flags of the target distribution, None for the model's own."""
  return {
      "guidance": flags.FLAGS.guidance, "temperature": flags.FLAGS.temperature,
      "top_k": flags.FLAGS.top_k, "top_p": flags.FLAGS.top_p,
  }


def refuse_preview(config: ml_collections.ConfigDict, what: str) -> None:
  """Raises UserError for a family that generates a preview first."""
  if "preview_side" in config:
    raise UserError(
        f"Expected a family of one grid for {what}, got {config.family}, which "
        "generates a preview first. Choose another --config.")


def writable_folder(path: str) -> pathlib.Path:
  """Makes the output folder and checks that it can be written.

  Raises:
    UserError: when it is not.
  """
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
        f"Expected a folder that can be made ({error.strerror}), got --out "
        f"{path}. Choose another."
    ) from error
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(
        f"Expected a folder that can be written, got --out {path}. Change its "
        "permissions or choose another."
    )
  return folder
