"""Emu3-Gen 8B (Wang et al. 2024, arXiv:2409.18869).

Rows end with a forced token. The prompt contains the size as plain digits. The
unconditional stream is a negative prompt with the same header and its own
positions.
"""

import base64
import functools
import pathlib
import unicodedata

import ml_collections
import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.extras import need
from ssd_jax.core.grid import Grid
from ssd_jax.families import published, training_defaults
from ssd_jax.families.published import Ids, PromptedByIds

RANKS, VISION = "emu3.tiktoken", "emu3_vision_tokens.txt"
CHOICES = ("ratio", "area", "suffix", "negative")  # may be set in each call
_MOST_PIXELS = 10**9  # of area
_MOST_SLOTS = 9216  # positions that the trunk was trained on
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the settings of a ratio such as "16:9"; "" is "1:1"."""
  variant = variant or "1:1"
  config = ml_collections.ConfigDict()
  config.family = "emu3"
  config.workdir = "runs/emu3"
  config.trunk = ml_collections.ConfigDict(dict(
      d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
      d_ff=14336, vocab_in=184_622, vocab_out=32_768, norm_eps=1e-5))
  config.vq = ml_collections.ConfigDict(dict(
      ch=256, ch_mult=(1, 2, 2, 4), num_res_blocks=2, z_channels=4,
      n_codes=32_768, code_dim=4, l2_norm=False, attn_levels=(3,), groups=32,
      video=True))
  config.theta = 1_000_000.0
  config.ids = ml_collections.ConfigDict(dict(
      specials=151_643, start=151_849, end_of_row=151_846, image=151_851,
      begin_of_image=151_852, first_code=151_854))
  config.area = 720 * 720  # pixels
  config.ratio = variant  # width:height
  config.suffix = " masterpiece, film grained, best quality."
  config.negative = (
      "lowres, bad anatomy, bad hands, text, error, missing fingers, extra "
      "digit, fewer digits, cropped, worst quality, low quality, normal "
      "quality, jpeg artifacts, signature, watermark, username, blurry.")
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=3.0, temperature=1.0, top_k=2048, top_p=1.0))
  training_defaults.add(config, prompts=5_000, batch=4 * 8)
  try:
    grid_size(config.ratio, config.area, 8)
  except UserError as error:
    raise ValueError(str(error)) from error
  return config


def grid_size(ratio: str, area: int, pixels_per_token: int) -> tuple[int, int]:
  """Returns the rows and columns of the grid for a ratio "width:height".

  Args:
    ratio: The ratio.
    area: Area of the image in pixels.
    pixels_per_token: Side of the square that a token covers.

  Raises:
    UserError: The ratio is not one of two positive integers, or is extreme.
  """
  check(1 <= area <= _MOST_PIXELS, "area", area, f"1 to {_MOST_PIXELS}")
  parts = ratio.split(":")
  if len(parts) != 2 or not all(
      p.isdecimal() and len(p) < 5 and int(p) for p in parts):
    raise UserError("Expected ratio to be WIDTH:HEIGHT in whole numbers, such "
                    f"as 16:9, got ratio {ratio!r}.")
  width, height = map(int, parts)
  side = (area / (width * height)) ** 0.5
  rows = round(height * side / pixels_per_token)
  cols = round(width * side / pixels_per_token)
  if min(rows, cols) < 1 or rows * (cols + 1) > _MOST_SLOTS:
    raise UserError(f"Expected ratio to give rows and at most {_MOST_SLOTS} "
                    f"tokens, got ratio {ratio!r}, a grid of {rows} x {cols}.")
  return rows, cols


class Emu3(PromptedByIds):
  """The Emu3-Gen family."""

  @functools.cached_property
  def grid(self) -> Grid:
    """The grid, with end-of-row tokens."""
    config = self.config
    rows, cols = grid_size(config.ratio, config.area, self.vq.cfg.downsample)
    return Grid(rows, cols, end_of_row=True)

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """Rows of the image tokens, then of the end-of-row token."""
    ids = self.config.ids
    image = ids.first_code + np.arange(self.trunk.vocab_out)
    return np.append(image, ids.end_of_row).astype(np.int32)

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the text and the negative prompt, each with the image header."""
    return (self._prompt(text + self.config.suffix),
            self._prompt(self.config.negative))

  def _prompt(self, text: str) -> tuple[int, ...]:
    ids, grid = self.config.ids, self.grid
    return (ids.start, *self.text_ids(text), ids.begin_of_image,
            *self.text_ids(f"{grid.rows}*{grid.cols}"), ids.image)

  @functools.cached_property
  def text_tokenizer(self):
    """The checkpoint's byte-pair encoding of text (`tiktoken.Encoding`)."""
    tiktoken = need("tiktoken", "text")
    names, words = self.tokenizer_file(VISION), self.tokenizer_file(RANKS)
    self.check_ids(names.read_bytes().decode("utf-8", "replace").split("\n"))
    try:
      pairs = (line.split() for line in words.read_bytes().splitlines() if line)
      ranks = {base64.b64decode(word): int(rank) for word, rank in pairs}
    except ValueError as error:
      raise published.damaged_tokenizer(words, error) from error
    self.check_ranks(ranks)
    return tiktoken.Encoding("emu3", pat_str=_WORDS, mergeable_ranks=ranks,
                             special_tokens={})

  def check_ranks(self, ranks: dict[bytes, int]) -> None:
    """Raises UserError unless word ids end where special tokens begin."""
    count = self.config.ids.specials
    if sorted(ranks.values()) != list(range(count)):
      raise UserError(
          f"Expected {RANKS} with the ids 0 to {count - 1}, each once, got "
          f"{RANKS} with {len(ranks)} entries. Convert again with its own "
          "tokenizer files.")

  def check_ids(self, names: list[str]) -> None:
    """Raises UserError unless the vision tokens have the expected ids.

    Args:
      names: Names of vision tokens; the first one has the id `image`.
    """
    ids = self.config.ids
    first, last = (f"<|visual token {token:06d}|>"
                   for token in (0, self.trunk.vocab_out - 1))
    expected = {"<|image token|>": ids.image,
                "<|image start|>": ids.begin_of_image, first: ids.first_code,
                last: ids.first_code + self.trunk.vocab_out - 1}
    line_of = {name.strip(): line for line, name in enumerate(names)}
    for name, index in expected.items():
      if ids.image + line_of.get(name, -1) != index:
        raise UserError(
            f"Expected {VISION} of this model, got one without {name!r} at id "
            f"{index}. Convert again with its own tokenizer files.")

  def text_ids(self, text: str) -> list[int]:
    """Returns the ids of a text in NFC; special tokens are not recognised."""
    if self.folder is None:
      return published.byte_ids(text)
    return self.text_tokenizer.encode_ordinary(
        unicodedata.normalize("NFC", text))


def from_settings(settings: dict, folder: pathlib.Path | None) -> Emu3:
  """Returns the family described by a model.json."""
  return Emu3(ml_collections.ConfigDict(settings["config"]), folder)
