"""Emu3-Gen 8B (Wang et al. 2024, arXiv:2409.18869).

Rows end with a forced token. The size stands in the prompt as plain digits. The
unconditional stream is a negative prompt with the same header, at positions of
its own.
"""

import base64
import functools
import pathlib
import unicodedata

import ml_collections
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.extras import need
from ssd_jax.core.grid import Grid
from ssd_jax.families import published, training_defaults
from ssd_jax.families.published import Ids, Published

RANKS, VISION = "emu3.tiktoken", "emu3_vision_tokens.txt"
CHOICES = ("ratio", "area", "suffix", "negative")  # at every drawing
_MOST_SLOTS = 9216  # positions that the trunk was trained on
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Settings; the variant is a ratio such as "16:9", "" is "1:1"."""
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


def grid_size(
    ratio: str, area: int, pixels_per_token: int
) -> tuple[int, int]:
  """(rows, columns) of the grid for a ratio "width:height".

  Raises:
    UserError: when it is no ratio of two positive whole numbers, or extreme.
  """
  parts = ratio.split(":")
  if len(parts) != 2 or not all(p.isdecimal() and int(p) for p in parts):
    raise UserError("Expected WIDTH:HEIGHT in whole numbers, such as 16:9, "
                    f"got ratio {ratio!r}. Change ratio.")
  width, height = map(int, parts)
  side = (area / (width * height)) ** 0.5
  rows, cols = round(height * side / cell), round(width * side / cell)
  if min(rows, cols) < 1 or rows * (cols + 1) > _MOST_SLOTS:
    raise UserError(f"Expected rows and at most {_MOST_SLOTS} tokens, got "
                    f"ratio {ratio!r}, a grid of {rows} x {cols}. Change "
                    "ratio.")
  return rows, cols


class Emu3(Published):
  """The family as a pipeline holds it."""

  @functools.cached_property
  def grid(self) -> Grid:
    """Each row ends with a forced token."""
    config = self.config
    rows, cols = grid_size(config.ratio, config.area, self.vq.cfg.downsample)
    return Grid(rows, cols, end_of_row=True)

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """Codes, then end-of-row."""
    ids = self.config.ids
    codes = ids.first_code + np.arange(self.trunk.vocab_out)
    return np.append(codes, ids.end_of_row).astype(np.int32)

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """The text, and the negative prompt, each before the image's header."""
    return (self._prompt(text + self.config.suffix),
            self._prompt(self.config.negative))

  def _prompt(self, text: str) -> tuple[int, ...]:
    ids, grid = self.config.ids, self.grid
    return (ids.start, *self.text_ids(text), ids.begin_of_image,
            *self.text_ids(f"{grid.rows}*{grid.cols}"), ids.image)

  @functools.cached_property
  def text_tokenizer(self):
    """Byte pairs of the checkpoint's own table (`tiktoken.Encoding`)."""
    tiktoken = need("tiktoken", "text")
    self.check_ids(self.tokenizer_file(VISION).read_text("utf-8").split("\n"))
    lines = self.tokenizer_file(RANKS).read_bytes().splitlines()
    pairs = (line.split() for line in lines if line)
    ranks = {base64.b64decode(word): int(rank) for word, rank in pairs}
    self.check_ranks(ranks)
    return tiktoken.Encoding("emu3", pat_str=_WORDS, mergeable_ranks=ranks,
                             special_tokens={})

  def check_ranks(self, ranks: dict[bytes, int]) -> None:
    """Raises UserError unless words end where the special tokens begin."""
    count = self.config.ids.specials
    if sorted(ranks.values()) != list(range(count)):
      raise UserError(
          f"Expected those of the ids 0 to {count - 1}, each once, got "
          f"{RANKS} with {len(ranks)} pieces of words. Convert again with "
          "its own tokenizer files.")

  def check_ids(self, names: list[str]) -> None:
    """Raises UserError unless the vision tokens' names are where ids say.

    The first line is the token before the picture, the others follow it.
    """
    ids = self.config.ids
    codes = [f"<|visual token {code:06d}|>"
             for code in (0, self.trunk.vocab_out - 1)]
    expected = {"<|image token|>": ids.image,
                "<|image start|>": ids.begin_of_image, codes[0]: ids.first_code,
                codes[1]: ids.first_code + self.trunk.vocab_out - 1}
    place = {name.strip(): line for line, name in enumerate(names)}
    for name, index in expected.items():
      if ids.image + place.get(name, -1) != index:
        raise UserError(
            f"Expected Emu3-Gen's, got {VISION} without {name!r} at id "
            f"{index}. Convert again with its own tokenizer files.")

  def text_ids(self, text: str) -> list[int]:
    """Ids of a text in NFC, no special tokens recognised."""
    if self.folder is None:
      return published.byte_ids(text)
    return self.text_tokenizer.encode_ordinary(
        unicodedata.normalize("NFC", text))


def from_settings(settings: dict, folder: pathlib.Path | None) -> Emu3:
  """The family of a model.json."""
  return Emu3(ml_collections.ConfigDict(settings["config"]), folder)
