"""Recipe for published checkpoints of Emu3-Gen 8B."""

from collections.abc import Iterable

import ml_collections

from ssd_jax.convert.recipes import (
  Part,
  Recipe,
  Row,
  Table,
  image_head,
  llama_layers,
  table_rows,
  vq_shapes,
)
from ssd_jax.convert.vq_recipes import vq_rows
from ssd_jax.families import published
from ssd_jax.families.emu3 import RANKS, VISION, Emu3, grid_size

_KEEP = ("trunk", "vq", "theta", "ids", "area", "ratio", "suffix", "negative",
         "sampling")
_VQ_FILES = tuple(
    f"{folder}{name}" for folder in ("**/Emu3-VisionTokenizer/",
                                     "**/vision_tokenizer/")
    for name in published.SAFETENSORS)


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder.

  Raises:
    UserError: The ratio is invalid.
  """
  family = Emu3(config)
  vq = family.vq.cfg
  grid_size(config.ratio, config.area, vq.downsample)
  ignored = (r".*num_batches_tracked",)
  return Recipe(
      config.family, published.settings_of(config, _KEEP),
      (Part("source", published.ANY_FORMAT,
            Table(tuple(trunk_rows(family)), (r".*rotary_emb\.inv_freq",)),
            published.trunk_shapes(family.trunk)),
       Part("vq", published.SAFETENSORS,
            Table(tuple(vq_rows(vq, "video")), ignored), vq_shapes(vq),
            in_source=_VQ_FILES)),
      (RANKS, VISION), family,
  )


def trunk_rows(family: Emu3) -> Iterable[Row]:
  """Yields the rows of a trunk with image tokens behind those of the text."""
  cfg, first = family.trunk, family.config.ids.first_code
  size = (cfg.vocab_in, cfg.d_model)
  yield table_rows("model.embed_tokens.weight", *size)
  yield from llama_layers(cfg, "model.")
  yield image_head("lm_head.weight", size, first, cfg.vocab_out)
