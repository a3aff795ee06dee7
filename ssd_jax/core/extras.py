"""Packages that only some commands need."""

import importlib
from types import ModuleType

from ssd_jax.core.config import UserError


class MissingExtra(UserError):
  """Packages of an extra are not installed."""


def need(module: str, extra: str) -> ModuleType:
  """The imported module of an extra.

  Raises:
    MissingExtra: when the extra is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise MissingExtra(
        f"Expected the packages of the extra {extra!r}, got no module "
        f"{module!r}. Run pip install 'ssd-jax[{extra}]'.") from error
