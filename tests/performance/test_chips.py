"""Names of TPU slices."""

import pytest

from ssd_jax.core.config import UserError
from ssd_jax.performance import (
  chips,
)


def test_unknown_slices_are_one_line():
  """A word that is no topology, with or without the compiler."""
  with pytest.raises(UserError, match="got --topology v9z:1x1"):
    chips.devices_of("v9z:1x1")
