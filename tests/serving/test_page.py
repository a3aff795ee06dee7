"""The live page in a real browser; see tests/browser/check.py."""

import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")),
    reason="there is no chromium on this machine")
def test_mouse_keyboard_phone_and_hostile_prompts(tmp_path):
  """All checks of the page pass, and nothing is wrong in its console."""
  done = subprocess.run(
      [sys.executable, "-m", "tests.browser.check", "--out", tmp_path],
      cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert (tmp_path / "phone.png").is_file()
