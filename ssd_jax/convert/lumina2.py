"""Recipe for published checkpoints of Lumina-mGPT 2.0."""

import ml_collections

from ssd_jax.convert.lumina import huggingface_rows
from ssd_jax.convert.recipes import Part, Recipe, Table, vq_shapes
from ssd_jax.convert.vq_recipes import vq_rows
from ssd_jax.families import published
from ssd_jax.families.lumina2 import TOKENIZER, Lumina2

_KEEP = ("trunk", "vq", "theta", "ids", "size", "sampling", "tokenizer")
_VQ_FILES = ("**/movqgan_270M.ckpt", "**/movqgan_270M.safetensors")


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder.

  Raises:
    UserError: The size is invalid.
  """
  family = Lumina2(config)
  vq, _ = family.vq.cfg, family.grid
  ignored = (r"loss\..*", r".*discriminator.*", r"(model_)?ema.*",
             r"quantize\.(ema|cluster|embed_avg).*")
  return Recipe(
      config.family, published.settings_of(config, _KEEP),
      (Part("source", published.ANY_FORMAT,
            Table(tuple(huggingface_rows(family)), (r"model\.vqmodel\..*",)),
            published.trunk_shapes(family.trunk)),
       Part("vq", _VQ_FILES, Table(tuple(vq_rows(vq, "taming")), ignored),
            vq_shapes(vq))),
      TOKENIZER, family,
  )
