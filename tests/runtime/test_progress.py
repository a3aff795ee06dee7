"""Progress bars show the time left; logs stay short."""

import io
import pathlib
import sys

import pytest

import ssd_jax
from ssd_jax.runtime.progress import Bar


class Stream(io.StringIO):
  """A file that is a terminal or is not."""

  def __init__(self, is_terminal):
    super().__init__()
    self.is_terminal = is_terminal

  def isatty(self):
    return self.is_terminal


@pytest.fixture
def watch(monkeypatch):
  monkeypatch.delitem(sys.modules, "ipykernel", raising=False)

  def run(is_terminal, minute):
    monkeypatch.setattr(sys, "stderr", stream := Stream(is_terminal))
    monkeypatch.setattr(Bar, "MINUTE", minute)
    with Bar(range(3), desc="drawing", unit="image") as bar:
      for step in bar:
        bar.set_postfix({"loss": step})
        bar.write(f"line {step}")
    return stream.getvalue()

  return run


def test_a_terminal_has_a_bar_with_the_time_left(watch, capsys):
  """A terminal's bar redraws one line and leaves it at the end."""
  said = watch(True, 60.0)
  assert "\rdrawing" in said and "<" in said and said.endswith("\n")
  assert "3/3" in said.splitlines()[-1]
  assert capsys.readouterr().out == "line 0\nline 1\nline 2\n"


def test_a_log_has_a_line_now_and_then(watch):
  """Whole lines with the time left when a minute is over, else nothing."""
  assert watch(False, 60.0) == ""
  said = watch(False, 0.0)
  assert "\r" not in said and said.endswith("\n") and "\n\n" not in said
  first, *_, last = said.splitlines()
  assert first.startswith("drawing:   0%") and "<" in first
  assert "3/3" in last and "loss=2" in last


def test_all_bars_are_of_one_kind():
  """No command has a bar of its own, which would fill a log."""
  root = pathlib.Path(ssd_jax.__file__).parent
  users = {path.name for path in root.rglob("*.py")
           if "import tqdm" in path.read_text("utf-8")}
  assert users == {"progress.py"}
