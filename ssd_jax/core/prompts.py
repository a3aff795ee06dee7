"""Validation of prompts typed by users."""

import unicodedata

from ssd_jax.core.config import UserError

MAX_CHARACTERS = 10_000


def clean(prompt: str, longest: int = MAX_CHARACTERS) -> str:
  """Removes control characters from a prompt.

  White space is kept: a family strips or normalises it as its original does.

  >>> clean(" a red\\n heart\\x07 ")
  ' a red\\n heart '

  Args:
    prompt: The prompt as typed.
    longest: Largest number of characters.

  Raises:
    UserError: The prompt is empty or too long.
  """
  text = "".join(
      c for c in prompt
      if c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cs"))
  if not text.strip():
    raise UserError(
        "Expected a prompt of a few words, got an empty prompt "
        f"{prompt[:20]!r}. Describe the image."
    )
  if len(text) > longest:
    raise UserError(
        f"Expected a prompt of at most {longest} characters, got a prompt of "
        f"{len(text)} characters. Shorten it."
    )
  return text
