"""GLM-Image (Z.ai 2026), its autoregressive stage.

A GLM-4 trunk generates two grids after a prompt: a preview of about 256 tokens,
then the image, each token of which stands for 32 x 32 pixels. There is no
guidance. The tokens are semantic: a diffusion transformer, which is not here,
paints them (`diffusers`' GlmImagePipeline, argument `prior_token_ids`).

Positions have three axes. Text counts on all of them; the image token (r, c) of
a grid that begins at p is at (p, p + r, p + c), and what follows the grid
begins at p + max(rows, columns). Rotations read differences only, so positions
are counted here from the end of the prompt.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Params, Prompt
from ssd_jax.families import published, training_defaults
from ssd_jax.families.published import Ids, PromptedByIds
from ssd_jax.models import rope
from ssd_jax.models.generator import Generator

CHOICES = ("size",)  # may be set in each call
PIXELS = 32  # per token and side
_MOST_SIDE = 64  # tokens
_LONGEST = 1024  # prompt
_OPENING, _CLOSING, _IMAGE = "<sop>", "<eop>", "<|dit_token_16384|>"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the settings of the published size; there is no other."""
  if variant:
    raise published.unknown_variant("glm_image", variant, ("none",))
  config = ml_collections.ConfigDict()
  config.family = "glm_image"
  config.workdir = "runs/glm_image"
  config.trunk = ml_collections.ConfigDict(dict(
      d_model=4096, n_layers=40, n_heads=32, n_kv_heads=2, head_dim=128,
      d_ff=13_696, vocab_in=168_064, vocab_out=16_384, norm_eps=1e-5,
      qkv_bias=True, post_norms=True))
  config.head_rows = 16_512  # of the published head; the first are image tokens
  config.theta = 10_000.0
  config.sections = (8, 12, 12)  # rotary pairs of each axis
  config.ids = ml_collections.ConfigDict(dict(start=16_384))
  config.size = "1024x1024"  # width x height
  config.preview_side = 16  # of the preview of a square image, in tokens
  config.tokenizer = "tokenizer.json"
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=1.0, temperature=0.9, top_k=0, top_p=0.75))
  training_defaults.add(config, prompts=20_000, batch=64)
  config.mtp.drop_caption = 0.0  # there is no unconditional stream
  return config


class GLMImage(PromptedByIds):
  """The GLM-Image family."""

  @functools.cached_property
  def grid(self) -> Grid:
    """The image's grid."""
    parts = str(self.config.size).split("x")
    sides = [int(p) for p in parts if p.isdecimal() and len(p) < 6]
    if len(sides) != 2 or len(parts) != 2 or any(
        side % PIXELS or not 1 <= side // PIXELS <= _MOST_SIDE
        for side in sides):
      raise UserError(
          f"Expected size to be WIDTHxHEIGHT, multiples of {PIXELS} up to "
          f"{PIXELS * _MOST_SIDE}, such as 1024x1024, got size "
          f"{self.config.size!r}.")
    return Grid(sides[1] // PIXELS, sides[0] // PIXELS)

  @functools.cached_property
  def preview(self) -> Grid:
    """The preview's grid, of nearly the same ratio."""
    ratio = self.grid.rows / self.grid.cols
    side = self.config.preview_side
    check(side >= 1, "preview_side", side, ">= 1")
    rows = int(math.sqrt(ratio) * side)
    cols = int(math.sqrt(1 / ratio) * side)
    if not rows or not cols:
      raise UserError(
          "Expected a size of at most 256 times the other side, got size "
          f"{self.config.size!r}.")
    return Grid(rows, cols)

  @property
  def input_ids(self) -> np.ndarray:
    """Rows of the image tokens, which come first."""
    return np.arange(self.trunk.vocab_out, dtype=np.int32)

  @functools.cached_property
  def rope(self) -> np.ndarray:
    """The rotary table: rows of the text, of the preview and of the image."""
    text = np.repeat(np.arange(-_LONGEST, 0)[:, None], 3, axis=1)
    begin = max(self.preview.rows, self.preview.cols)
    places = [text, _places(self.preview, 0), _places(self.grid, begin)]
    return rope.table_axes(np.concatenate(places), self.trunk.head_dim,
                           self.config.theta, self.config.sections)

  @functools.cached_property
  def generator(self) -> Generator:
    """The trunk with its grids."""
    return dataclasses.replace(super().generator, preview=self.preview)

  def encode_prompts(
      self, prompts: Sequence[str], guided: bool
  ) -> tuple[Prompt, list[str]]:
    """Encodes texts as inputs of the trunk; see `Published`.

    Positions cover both grids.

    Raises:
      UserError: `guided`, as the model has one stream.
    """
    if guided:
      raise UserError(
          "Expected guidance 1, as GLM-Image has no unconditional stream, got "
          "another guidance. Leave it out.")
    prompt, notes = super().encode_prompts(prompts, guided)
    streams, length = prompt.tokens.shape
    rows_P = np.arange(_LONGEST - length, len(self.rope))
    positions = jnp.broadcast_to(jnp.asarray(rows_P), (streams, len(rows_P)))
    return dataclasses.replace(prompt, positions=positions), notes

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the text with both sizes, rows first; no other stream."""
    sizes = (f"{_OPENING}{grid.rows} {grid.cols}{_CLOSING}"
             for grid in (self.grid, self.preview))
    return (*self.text_ids(text + "".join(sizes)), self.config.ids.start), ()

  @functools.cached_property
  def text_tokenizer(self):
    """The checkpoint's text tokenizer, with its ids checked."""
    tokenizer, start = super().text_tokenizer, self.config.ids.start
    for token in (_OPENING, _CLOSING, _IMAGE):
      found = tokenizer.token_to_id(token)
      if found is None or (token == _IMAGE and found != start):
        raise UserError(
            f"Expected the tokenizer of GLM-Image with {_IMAGE} at id {start}, "
            f"got one with {token} at {found}. Convert again with the "
            "checkpoint's own.")
    return tokenizer

  def decode(self, vq_params: Params, tokens_BRC: jax.Array) -> jax.Array:
    """Returns images of 0 x 0 pixels: the tokens are not pixels' codes."""
    del vq_params
    return jnp.zeros((len(tokens_BRC), 0, 0, 3), jnp.uint8)


def prior_ids(tokens_BRC: np.ndarray) -> np.ndarray:
  """Returns image tokens as GlmImagePipeline takes them, int64 [B, 4 R C].

  Each is repeated 2 x 2 times; rows follow each other.

  >>> prior_ids(np.array([[[1, 2]]])).tolist()
  [[1, 1, 2, 2, 1, 1, 2, 2]]
  """
  repeated = np.asarray(tokens_BRC, np.int64).repeat(2, 1).repeat(2, 2)
  return repeated.reshape(len(repeated), -1)


def _places(grid: Grid, begin: int) -> np.ndarray:
  """Returns the coordinates of a grid's tokens, int [R C, 3]."""
  row, col = np.divmod(np.arange(grid.length), grid.cols)
  return begin + np.stack([np.zeros_like(row), row, col], axis=1)


def from_settings(settings: dict, folder: pathlib.Path | None) -> GLMImage:
  """Returns the family described by a model.json."""
  return GLMImage(ml_collections.ConfigDict(settings["config"]), folder)
