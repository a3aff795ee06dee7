"""Captions of LlamaGen's text-conditional model: cleaning and features.

The cleaning rules are those of DeepFloyd IF and PixArt, in the same order, as
they determine which tokens the model sees. They are applied twice.
"""

from collections.abc import Sequence
import html
import re
import urllib.parse

import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.extras import need

_DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b"
    "\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d")
_LETTER = "[a-zA-Z]"

_ADDRESSES = tuple((rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", "")
                   for scheme in ("https?", "www"))
_SYMBOLS = (
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u31ff\u3200-\u4dff\u4e00-\u9fff]+", ""),  # CJK
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_PHRASES = (
    (rf"\b{_LETTER}{{1,3}}\d{{3,15}}\b", ""),
    (rf"\b{_LETTER}+\d+{_LETTER}+\b", ""),
    (rf"\b\d+{_LETTER}+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (rf"\b\d*{_LETTER}+\d+{_LETTER}+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    ("^[\"']([\\w\\W]+)[\"']$", r"\1"),
    ("^['_,:;-]", ""),
    ("['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)


def clean(caption: str) -> str:
  """Returns the caption as the text encoder expects it."""
  return _clean(_clean(caption))


def _clean(text: str) -> str:
  soup, ftfy = need("bs4", "text"), need("ftfy", "text")
  text = urllib.parse.unquote_plus(text).strip().lower()
  text = _replace(text.replace("<person>", "person"), _ADDRESSES)
  text = soup.BeautifulSoup(text, features="html.parser").text
  text = _replace(text, _SYMBOLS)
  if len(re.findall("[-_]", text)) > 3:  # words-joined-like-this
    text = re.sub("[-_]", " ", text)
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return _replace(text, _PHRASES).strip()


def _replace(text: str, rules: tuple[tuple[str, str], ...]) -> str:
  for pattern, replacement in rules:
    text = re.sub(pattern, replacement, text)
  return text


Features = tuple[np.ndarray, np.ndarray, list[str]]


def read_features(files: Sequence[str], shape: tuple[int, ...]) -> Features:
  """Reads caption features from .npy files.

  Args:
    files: Files with arrays [L, E] or [1, L, E], which are truncated to T.
    shape: [B, T, E].

  Returns:
    Features [B, T, E], which of them exist [B, T], and notes.

  Raises:
    UserError: A file is unreadable or its array has another shape.
  """
  _, slots, width = shape
  features, mask = np.zeros(shape, np.float32), np.zeros(shape[:2], bool)
  notes = []
  for i, file in enumerate(files):
    x = _read_array(file, width)
    if len(x) > slots:
      notes.append(f"{file} holds features of {len(x)} words, of which the "
                   f"model reads the first {slots}")
    x = x[:slots]
    features[i, :len(x)] = x
    mask[i, :len(x)] = True
  return features, mask, notes


def _read_array(file: str, width: int) -> np.ndarray:
  """Returns the features of one file, float [L, E]."""
  try:
    x = np.load(file, allow_pickle=False)
  except Exception as error:  # numpy raises many types for damaged files
    raise UserError("Expected a readable .npy file of caption features, got "
                    f"prompt {file!r}.") from error
  if not isinstance(x, np.ndarray) or not np.issubdtype(x.dtype, np.floating):
    raise UserError(
        f"Expected an array of floats, got {file}, which holds "
        f"{getattr(x, 'dtype', 'several arrays')}. Save caption features.")
  if x.ndim not in (2, 3) or not x.size or x.shape[-1] != width or (
      x.ndim == 3 and len(x) != 1):
    raise UserError(
        f"Expected features of shape (1, LENGTH, {width}), got features of "
        f"shape {x.shape} in {file}. Compute them with flan-t5-xl.")
  if not np.isfinite(x).all():
    raise UserError(
        f"Expected finite features, got nan or inf in {file}. Compute them "
        "again.")
  return x.reshape(-1, width)


def random_features(
    prompts: Sequence[str], shape: tuple[int, ...]
) -> Features:
  """Returns random features, one per word and one for the end of the caption.

  Args:
    prompts: Captions.
    shape: [B, T, E].

  Returns:
    As `read_features`.
  """
  counts = np.array([[len(str(prompt).split()) + 1] for prompt in prompts])
  features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  return features, np.arange(shape[1]) < counts, [
      "random weights have no text encoder, so caption features are random "
      "too; pass a prompt FILE.npy to use your own features"]
