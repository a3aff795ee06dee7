"""Recipe for published checkpoints of Lumina-mGPT-7B."""

from collections.abc import Iterable

import ml_collections

from ssd_jax.convert.recipes import (
  Part,
  Recipe,
  Table,
  image_head,
  llama_layers,
  table_rows,
  vq_shapes,
)
from ssd_jax.convert.vq_recipes import vq_rows
from ssd_jax.families import published
from ssd_jax.families.lumina import Lumina, parse_size
from ssd_jax.families.published import Published

_KEEP = ("trunk", "vq", "theta", "ids", "size", "target_size", "sampling",
         "tokenizer")


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder.

  Raises:
    UserError: The model does not support the size.
  """
  parse_size(config.size, config.target_size)
  family = Lumina(config)
  return Recipe(
      config.family, published.settings_of(config, _KEEP),
      (Part("source", published.ANY_FORMAT,
            Table(tuple(huggingface_rows(family)), (r"model\.vqmodel\..*",)),
            published.trunk_shapes(family.trunk)),
       chameleon_vq(family)),
      (config.tokenizer,), family,
  )


def huggingface_rows(family: Published) -> Iterable:
  """Yields the rows of a Chameleon trunk, named as in transformers."""
  cfg, first = family.trunk, family.config.ids.first_code
  size = (cfg.vocab_in, cfg.d_model)
  yield table_rows("model.embed_tokens.weight", *size)
  yield from llama_layers(cfg, "model.")
  yield image_head("lm_head.weight", size, first, cfg.vocab_out)


def chameleon_vq(family: Published) -> Part:
  """Returns Chameleon's image tokenizer, which is a separate file."""
  cfg = family.vq.cfg
  ignored = (r"loss\..*", r".*discriminator.*")
  return Part("vq", published.CHAMELEON_VQ,
              Table(tuple(vq_rows(cfg, "taming")), ignored), vq_shapes(cfg))
