"""What all commands do with their arguments and terminals."""

import io
import sys

from absl import flags
import pytest

from ssd_jax.cli import common, run
from ssd_jax.core.config import UserError
from ssd_jax.core.prompts import clean
from ssd_jax.visualization.album import file_name


@pytest.mark.parametrize("given, found", [
    (["--out=~/x"], ["--out=/home/me/x"]), (["--out", "~/x"], None),
    (["--config.workdir=~/r"], ["--config.workdir=/home/me/r"]),
    (["--config=~/c.py:smoke"], ["--config=/home/me/c.py:smoke"]),
    (["--prompt=~/x"], ["--prompt=~/x"]),
    (["--prompt", "~/x"], ["--prompt", "~/x"]),
    (["--out=a~/x"], ["--out=a~/x"])])
def test_home_is_expanded_behind_an_equals_sign(monkeypatch, given, found):
  """~ is expanded in --flag=~/x, and not in a prompt."""
  monkeypatch.setenv("HOME", "/home/me")
  assert run._with_home(["name", *given])[1:] == (
      found or ["--out", "/home/me/x"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed_on_any_terminal(monkeypatch, encoding):
  """A prompt or a file's name that the terminal lacks letters for."""
  shown = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
  monkeypatch.setattr(sys, "argv", ["name", "--help"])
  run.main(lambda: None)
  print("\u4e2d\udce9")
  sys.stdout.flush()
  assert shown.getvalue().endswith(b"\\udce9\n")


def test_a_prompt_that_is_no_utf8_is_one_line():
  """No byte is dropped in silence."""
  with pytest.raises(UserError, match=r"UTF-8, got .*'caf\\udce9'"):
    clean("caf\udce9")


def test_a_file_name_has_letters_that_the_system_knows(monkeypatch):
  """A prompt in another script is drawn, not refused at the end."""
  assert file_name("a \u4e2d") == "a_\u4e2d"
  monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "latin-1")
  assert file_name("a \u4e2d") == "a" and file_name("\u4e2d") == "prompt"


def test_models_are_listed_only_where_they_are_named(capsys):
  """`--model list` prints the table; a command without that flag runs."""
  ran = []
  body = lambda: ran.append(True)
  known = flags.FLAGS["model"] if "model" in flags.FLAGS else None
  if "config" not in flags.FLAGS:
    run.define_config()
  try:
    common.define_flags("model")
    run.main(body, ["name", "--model", "list"], runs_here=False)
    assert not ran and "simplear-1.5b" in capsys.readouterr().out
    delattr(flags.FLAGS, "model")
    run.main(body, ["name"], runs_here=False)
    assert ran
  finally:
    if "model" not in flags.FLAGS and known is not None:
      flags.FLAGS["model"] = known
    common.define_flags("model")
    flags.FLAGS["model"].unparse()
