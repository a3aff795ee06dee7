"""What --config may change of a model that exists."""

import os
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from ssd_jax.core.config import UserError
from ssd_jax.pipeline import model_folder
from ssd_jax.pipeline.pipeline import Pipeline

_VARIANT = ("classes", "layout", "side", "target_size")


def choices(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the settings that the command line overrides."""
  flag = flags.FLAGS["config"]
  open_ = model_folder.CHOICES.get(config.family, ())
  chosen = {"sampling": config.sampling.to_dict()} if flag.present else {}
  if names_variant():
    chosen |= {key: config[key] for key in open_}
  given = config_flags.get_override_values(flag)
  return chosen | {key: value for key, value in given.items()
                   if key.partition(".")[0] in ("sampling", *open_)}


def names_variant() -> bool:
  """Returns whether --config names a variant after a colon."""
  flag = flags.FLAGS["config"]
  return bool(flag.present) and ":" in config_flags.get_config_filename(flag)


def flags_of(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the flags that make the same choices again, sampling aside."""
  flag = flags.FLAGS["config"]
  made = {key: value for key, value in choices(config).items()
          if key.partition(".")[0] != "sampling"}
  if not made:
    return []
  given = config_flags.get_override_values(flag)
  return ["--config", config_flags.get_config_filename(flag),
          *(f"--config.{key}={made[key]}" for key in made if key in given)]


def check_variant(
    folder: str | os.PathLike, config: ml_collections.ConfigDict
) -> None:
  """Raises UserError if a checkpoint is of another variant than --config.

  Args:
    folder: Model folder; only published families have variants.
    config: Settings, whose overridden keys are not compared.
  """
  settings = model_folder.read_settings(folder)
  _check_family(settings["family"], config)
  if config.family == "emoji":
    return
  flag = flags.FLAGS["config"]
  given = config_flags.get_override_values(flag)
  wanted = _variant(config.to_dict())
  found = _variant(settings.get("config"))
  for key in sorted(wanted.keys() & found.keys() - given.keys()):
    if wanted[key] != found[key]:
      raise UserError(
          f"Expected a checkpoint of {key}={wanted[key]}, as --config "
          f"{config_flags.get_config_filename(flag)} has it, got {folder} with "
          f"{key}={found[key]}. Name its variant after the config's colon, or "
          "another --config.checkpoint.")


def _variant(config: Any) -> dict[str, Any]:
  """Returns the settings that differ between checkpoints of a family."""
  if not isinstance(config, dict):
    return {}  # a damaged file, which the loader names
  found = {key: config[key] for key in _VARIANT if key in config}
  trunk = config.get("trunk")
  sizes = trunk if isinstance(trunk, dict) else {}
  return found | {f"trunk.{key}": value for key, value in sizes.items()}


def check_family(pipe: Pipeline, config: ml_collections.ConfigDict) -> None:
  """Raises UserError if --config names another family than the model's."""
  if flags.FLAGS["config"].present:
    _check_family(pipe.family.name, config)


def _check_family(family: str, config: ml_collections.ConfigDict) -> None:
  if config.family != family:
    raise UserError(
        f"Expected one family, got --config of family {config.family!r} and a "
        f"model of {family!r}. Set --checkpoint to a model of it.")
