"""Recipe for published checkpoints of Emu3.5-Image."""

import ml_collections

from ssd_jax.convert.emu3 import trunk_rows
from ssd_jax.convert.recipes import Part, Recipe, Table, vq_shapes
from ssd_jax.convert.vq_recipes import vq_rows
from ssd_jax.families import published
from ssd_jax.families.emu3 import RANKS, VISION
from ssd_jax.families.emu3_5 import Emu35

_KEEP = ("trunk", "vq", "theta", "ids", "ratio", "source_area",
         "sampling")
_VQ_FILES = ("**/model.ckpt", "**/model.safetensors")
_IN_SOURCE = tuple(f"**/{folder}/{name.removeprefix('**/')}" for folder in (
    "Emu3.5-VisionTokenizer", "vision_tokenizer") for name in _VQ_FILES)


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder.

  Raises:
    UserError: The ratio is unknown.
  """
  family = Emu35(config)
  vq, _ = family.vq.cfg, family.grid
  ignored = (r"loss\..*", r".*discriminator.*", r"model_ema\..*")
  return Recipe(
      config.family, published.settings_of(config, _KEEP),
      (Part("source", published.ANY_FORMAT,
            Table(tuple(trunk_rows(family)), (r".*rotary_emb\.inv_freq",)),
            published.trunk_shapes(family.trunk)),
       Part("vq", _VQ_FILES, Table(tuple(vq_rows(vq, "taming")), ignored),
            vq_shapes(vq), in_source=_IN_SOURCE)),
      (RANKS, VISION), family,
  )
