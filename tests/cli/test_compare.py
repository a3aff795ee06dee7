"""infer.compare without what it compares with."""

import os
import subprocess
import sys

from tests.support import ROOT


def test_without_the_extra_one_line_says_what_to_install(tmp_path):
  """Exit status 2, one line with the command to run, nothing written."""
  (tmp_path / "torch.py").write_text("raise ImportError('not installed')")
  out = tmp_path / "out"
  done = subprocess.run(
      [sys.executable, "-m", "infer.compare", f"--out={out}"], cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
      text=True)
  assert done.returncode == 2
  assert "pip install 'ssd-jax[parity]'" in done.stderr.splitlines()[-1]
  assert "Traceback" not in done.stderr and not out.exists()
