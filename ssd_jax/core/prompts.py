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
    UserError: The prompt is empty, too long or was no UTF-8.
  """
  text = "".join(
      c for c in prompt
      if c in "\t\n\r" or unicodedata.category(c) != "Cc")
  if any(unicodedata.category(c) == "Cs" for c in text):
    raise UserError(
        "Expected a prompt in UTF-8, got bytes of another encoding in "
        f"{ascii(prompt[:40])}. Set the terminal to UTF-8, or write the prompt "
        "into a file in UTF-8.")
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
