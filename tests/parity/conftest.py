"""These tests need the extra `parity`: PyTorch and transformers."""

import importlib.util
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent.parent))
_HAS_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore = [] if _HAS_TORCH else ["test_parity.py"]


def pytest_report_header(config):
  del config
  return None if _HAS_TORCH else (
      "parity tests are left out: pip install 'ssd-jax[parity]'")
