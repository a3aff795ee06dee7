"""Prompts as people type them."""

import unicodedata

from ssd_jax.config import UserError

LONGEST = 10_000  # characters


def clean(prompt: str, longest: int = LONGEST) -> str:
  """A prompt without control characters and surplus white space.

  >>> clean(" a red\\n heart ")
  'a red heart'

  Raises:
    UserError: when it is empty or too long.
  """
  printable = "".join(
      " " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c
      for c in prompt
  )
  text = " ".join(printable.split())
  if not text:
    raise UserError(
        f"got an empty prompt {prompt[:20]!r}, expected a few words; say what "
        "to draw"
    )
  if len(text) > longest:
    raise UserError(
        f"got a prompt of {len(text)} characters, expected at most "
        f"{longest}; shorten it"
    )
  return text
