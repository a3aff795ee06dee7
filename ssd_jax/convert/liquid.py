"""Recipe for published checkpoints of Liquid-7B."""

from collections.abc import Iterable
import math

import ml_collections
import numpy as np

from ssd_jax.convert.lumina import chameleon_vq
from ssd_jax.convert.recipes import (
  Part,
  Recipe,
  Row,
  Source,
  Table,
  image_head,
  llama_layers,
)
from ssd_jax.families import published
from ssd_jax.families.liquid import Liquid

_KEEP = ("trunk", "vq", "theta", "side", "sampling", "tokenizer")
_TABLE = "model.embed_tokens.weight"


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder."""
  family = Liquid(config)
  part = Part("source", published.ANY_FORMAT,
              Table(tuple(_trunk_rows(family)), (r".*rotary_emb\.inv_freq",)),
              published.trunk_shapes(family.trunk))
  return Recipe(config.family, published.settings_of(config, _KEEP),
                (part, chameleon_vq(family)), (config.tokenizer,), family)


def _trunk_rows(family: Liquid) -> Iterable[Row]:
  cfg = family.trunk
  size = (cfg.vocab_in, cfg.d_model)
  scale = np.float32(math.sqrt(cfg.d_model))  # Gemma scales its inputs
  yield Row("trunk/embedding", (Source(_TABLE, size),),
            lambda x: x.astype(np.float32) * scale, by_rows=True)
  yield from llama_layers(cfg, "model.")
  yield image_head("lm_head.weight", size, cfg.vocab_in - cfg.vocab_out,
                   cfg.vocab_out, tied=_TABLE)
