"""Prompts as people type them."""

import unicodedata

from ssd_jax.core.config import UserError

LONGEST = 10_000  # characters


def clean(prompt: str, longest: int = LONGEST) -> str:
  """A prompt as it was typed, without control characters.

  White space stays: a family strips or folds it where its original does.

  >>> clean(" a red\\n heart\\x07 ")
  ' a red\\n heart '

  Raises:
    UserError: when it is empty or too long.
  """
  text = "".join(
      c for c in prompt
      if c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cs"))
  if not text.strip():
    raise UserError(
        f"Expected a few words, got an empty prompt {prompt[:20]!r}. Say what "
        "to draw."
    )
  if len(text) > longest:
    raise UserError(
        f"Expected at most {longest}, got a prompt of {len(text)} characters. "
        "Shorten it."
    )
  return text
