"""Anole-7B (Chern et al. 2024, arXiv:2407.06135), a generating Chameleon.

The grid has 32 x 32 image tokens and no end-of-row tokens. The unconditional
stream is the begin-of-sequence and begin-of-image tokens.
"""

import functools
import pathlib

import ml_collections
import numpy as np

from ssd_jax.core.grid import Grid
from ssd_jax.families import lumina, published, training_defaults
from ssd_jax.families.published import Ids

VARIANTS = ("native", "hf")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the settings of a checkpoint layout; "" is "native"."""
  variant = variant or "native"
  if variant not in VARIANTS:
    raise published.unknown_variant("anole", variant, VARIANTS)
  config = lumina.chameleon()
  config.family = "anole"
  config.workdir = "runs/anole"
  config.layout = variant
  config.side = 32  # image tokens
  config.tokenizer = (
      "text_tokenizer.json" if variant == "native" else "tokenizer.json")
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=3.0, temperature=0.7, top_k=0, top_p=0.9))
  training_defaults.add(config, prompts=20_000, batch=4 * 32)
  return config


class Anole(lumina.Chameleon):
  """The Anole family."""

  @functools.cached_property
  def grid(self) -> Grid:
    """A square grid without end-of-row tokens."""
    return Grid(self.config.side, self.config.side)

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """Rows of the image tokens."""
    return lumina.chameleon_input_ids(self.config)[:-1]

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the text unchanged, and the start of an image without text."""
    ids = self.config.ids
    prompt = (ids.start, *self.text_ids(text), ids.end_of_turn, ids.image)
    return prompt, (ids.start, ids.image)


def from_settings(settings: dict, folder: pathlib.Path | None) -> Anole:
  """Returns the family described by a model.json."""
  return Anole(ml_collections.ConfigDict(settings["config"]), folder)
