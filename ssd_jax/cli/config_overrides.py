"""What --config may change of a model that exists."""

from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from ssd_jax.core.config import UserError
from ssd_jax.pipeline import model_folder
from ssd_jax.pipeline.pipeline import Pipeline


def choices(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the settings that the command line overrides."""
  flag = flags.FLAGS["config"]
  chosen = {"sampling": config.sampling.to_dict()} if flag.present else {}
  if flag.present and ":" in config_flags.get_config_filename(flag):
    open_ = model_folder.CHOICES.get(config.family, ())
    chosen |= {key: config[key] for key in open_}
  return chosen | config_flags.get_override_values(flag)


def check_family(pipe: Pipeline, config: ml_collections.ConfigDict) -> None:
  """Raises UserError if --config names another family than the model's."""
  if flags.FLAGS["config"].present and config.family != pipe.family.name:
    raise UserError(
        f"Expected one family, got --config of family {config.family!r} and a "
        f"model of {pipe.family.name!r}. Set --checkpoint to a model of it."
    )
