"""Imports of optional dependencies, the package's extras."""

import importlib
from types import ModuleType

from ssd_jax.core.config import UserError


class MissingExtra(UserError):
  """The packages of an extra are not installed."""


def need(module: str, extra: str) -> ModuleType:
  """Imports a module of an extra.

  Args:
    module: Name of the module.
    extra: Name of the extra that provides it.

  Raises:
    MissingExtra: The extra is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise MissingExtra(
        f"Expected the packages of the extra {extra!r}, got no module "
        f"{module!r}. Run pip install 'ssd-jax[{extra}]'.") from error
