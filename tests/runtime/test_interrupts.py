"""Ctrl-C and SIGTERM end a run well, and never inside a callback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ssd_jax.runtime import interrupts
from ssd_jax.training.preemption import Preemption
from tests.support import ROOT

CHILD = """
import os, signal, sys, time
from ssd_jax.runtime import interrupts
from ssd_jax.storage import files
from ssd_jax.training.preemption import Preemption

def press():
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(0.2)

"""


def run(body, folder):
  """(exit status, stderr) of a program that presses Ctrl-C."""
  child = subprocess.run(
      [sys.executable, "-c", CHILD + body], cwd=folder, capture_output=True,
      text=True, timeout=100, env=os.environ | {"PYTHONPATH": str(ROOT)})
  return child.returncode, child.stderr


@pytest.mark.parametrize("number, status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_first_signal_is_a_request(number, status, capsys):
  """The run ends where it wants to, with one line; handlers are as before."""
  before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  with pytest.raises(SystemExit) as end, Preemption() as preemption:
    assert not preemption.is_due()
    os.kill(os.getpid(), number)
    while not preemption.is_due():
      time.sleep(0.001)
    preemption.stop("saved step 3")
  assert end.value.code == status
  name = "Ctrl-C" if status else "SIGTERM"
  assert capsys.readouterr().err == (
      f"stopped by {name}: saved step 3; start again to continue\n")
  assert before == [
      signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


def test_a_request_outlives_a_stage_of_a_command(capsys):
  """Pressed while one stage ends, it is heeded by the next."""
  with interrupts.watched():
    with Preemption():
      os.kill(os.getpid(), signal.SIGINT)
      while not interrupts.requested():
        time.sleep(0.001)
    with Preemption() as preemption:
      assert preemption.is_due()
  with Preemption() as preemption:
    assert not preemption.is_due()


@pytest.mark.slow
@pytest.mark.parametrize("body", [
    "with interrupts.watched():\n  press()",
    "with Preemption():\n  press(); press()"])
def test_an_end_at_once_waits_for_a_file(tmp_path, body):
  """Status 130 and one line; a file being written is whole, nothing beside."""
  write = """
import threading

def slowly():
  with files.replacing("x") as partial:
    partial.write_text("a")
    time.sleep(0.6)
    partial.write_text("whole")

threading.Thread(target=slowly).start()
time.sleep(0.1)
"""
  assert run(write + body, tmp_path) == (130, "interrupted\n")
  assert os.listdir(tmp_path) == ["x"]
  assert (tmp_path / "x").read_text() == "whole"


@pytest.mark.slow
def test_tries_at_many_moments(tmp_path):
  """Before, in and after steps and saves: whatever was saved goes on, no
  traceback, no crash."""
  for i in range(8):
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.tiny_training", "--workdir",
         tmp_path, "--steps=100000"], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)})
    time.sleep(1.0 + 0.7 * i)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=100)[1]
    assert child.returncode in (130, -signal.SIGINT), said
    assert "Traceback" not in said
    assert child.returncode < 0 or said.splitlines()[-1] == "interrupted" or (
        "stopped by Ctrl-C: saved step" in said)
