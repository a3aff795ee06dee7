"""Hostile input: one line, exit status 2, nothing left behind."""

import dataclasses
import re

from hypothesis import given, settings, strategies as st
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.prompts import clean
from ssd_jax.decoding import registry
from tests.support import ROOT, bad_inputs

GOLDEN = ROOT / "tests" / "golden" / "errors.txt"
CASES = list(bad_inputs.cases())
ANSWERS = {(name, what): answer for name, what, answer in (
    line.split("\t") for line in GOLDEN.read_text("utf-8").splitlines())}


def without_reason(said):
  """An answer without what another library says, which its version may say
  otherwise."""
  return re.sub(r" ?\(.*\)", "", said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("bad")
  bad_inputs.make_files(path)
  return path


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", dict.fromkeys(case[0] for case in CASES))
def test_every_bad_input_ends_in_one_line(name, folder, monkeypatch):
  """Each case of a command: status 2, the line of the golden file, no files."""
  monkeypatch.chdir(ROOT)
  for command, what, args in CASES:
    if command != name:
      continue
    status, error, written = bad_inputs.feed(command, args, folder)
    assert status == 2, (what, status, error)
    assert error.startswith("Expected ") and ", got " in error, (what, error)
    assert error.count("\n") == 1 and error.endswith("\n"), (what, error)
    assert not written, (what, written)
    said = error.strip().replace(str(folder), "DIR")
    assert without_reason(said) == without_reason(ANSWERS[name, what]), what


@pytest.mark.parametrize("name", dict.fromkeys(case[0] for case in CASES))
def test_help_is_at_hand(name, folder):
  """--help of every command ends well and writes nothing."""
  status, error, written = bad_inputs.feed(name, ["--help"], folder)
  assert (status, error, written) == (0, "", [])


def test_the_golden_file_has_every_case():
  """tests/golden/make_errors.py has written an answer for each of them."""
  assert list(ANSWERS) == [case[:2] for case in CASES]


@settings(max_examples=300, deadline=None)
@given(st.text() | st.builds(
    "{}:{}".format, st.sampled_from(sorted(registry.DECODERS)),
    st.text("abcdefghijklmnopqrstuvwxyz_=+,.:-0123456789", max_size=30)))
def test_any_text_is_a_decoder_or_one_line(text):
  """Whatever is typed as a decoder is one, or an error that teaches."""
  try:
    decoder = registry.parse(text)
  except UserError as error:
    assert "Expected " in str(error)
    return
  assert registry.DECODERS[decoder.name] is type(decoder)
  assert hash(decoder) == hash(registry.parse(text))


@pytest.mark.parametrize("text", [
    "ssd:rounds=2147483648", "sjd:window=5000000000+tail=reference",
    "ssd:rounds=1+rounds=3", "mtp:rounds=3", "ssd:lag=1",
])
def test_settings_that_nothing_can_read_are_one_line(text):
  """Numbers beyond all counts, a key twice, what another mode would read."""
  with pytest.raises(UserError, match="^Expected .*, got "):
    registry.parse(text)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=200))
def test_any_text_is_a_prompt_or_one_line(text):
  """A cleaned prompt is text without control characters, and stays so."""
  try:
    prompt = clean(text)
  except UserError as error:
    assert "Expected " in str(error)
    return
  assert prompt == clean(prompt) and prompt.strip()
  assert not any(ord(c) < 32 and c not in "\t\n\r" for c in prompt)
  prompt.encode()


@pytest.mark.parametrize("decoder", registry.DECODERS.values())
def test_defaults_can_be_typed_as_they_are_shown(decoder):
  """The live page lists Python's values, None and False among them."""
  shown = [(f.name, f.default) for f in dataclasses.fields(decoder)
           if f.default is None or isinstance(f.default, bool)]
  text = "+".join(f"{name}={value}" for name, value in shown)
  assert registry.parse(f"{decoder.name}:{text}") == decoder()
