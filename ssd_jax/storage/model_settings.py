"""Settings of a model folder, model.json, with a checksum.

Sizes and words decide what the weights mean: with a changed one a model still
draws, but as another model. Sampling defaults are the user's to change.
"""

import hashlib
import json
import pathlib
from typing import Any

from ssd_jax.core.config import UserError
from ssd_jax.storage.files import read_json, write_json

_KEY = "checksum"


def write(file: pathlib.Path, settings: dict[str, Any]) -> None:
  """Writes model.json.

  Args:
    file: The file.
    settings: Its values; a checksum among them is replaced.
  """
  write_json(file, settings | {_KEY: checksum(settings)})


def read(file: pathlib.Path) -> dict[str, Any]:
  """Returns the settings of model.json; older ones have no checksum.

  Raises:
    UserError: if it is missing or damaged, or its settings were changed.
  """
  settings: dict[str, Any] = read_json(file, dict)
  if settings.get(_KEY, checksum(settings)) != checksum(settings):
    raise UserError(
        f"Expected the settings that the weights of {file.parent} were made "
        f"with, got changed ones in {file.name} (sampling alone may be "
        "changed). Put them back, or convert or train the model again.")
  return settings


def checksum(settings: dict[str, Any]) -> str:
  """Returns the checksum of all settings but those of sampling."""
  fixed = {k: v for k, v in settings.items() if k != _KEY}
  if isinstance(config := fixed.get("config"), dict):
    fixed["config"] = {k: v for k, v in config.items() if k != "sampling"}
  text = json.dumps(fixed, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
