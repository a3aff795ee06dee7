"""Recipe for published checkpoints of SimpleAR."""

from collections.abc import Iterable

import ml_collections

from ssd_jax.convert import cosmos
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
from ssd_jax.families import published
from ssd_jax.families.simplear import SimpleAR

_KEEP = ("trunk", "vq", "theta", "side", "first_added", "prefix", "negative",
         "sampling", "tokenizer")
_TABLE = "model.embed_tokens.weight"
_IGNORED = (r".*rotary_emb\.inv_freq", r"model\.vision_tower\..*",
            r"model\.mm_projector\..*", r"model\.image_newline")


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder."""
  family = SimpleAR(config)
  vq = family.vq.cfg
  return Recipe(
      config.family, published.settings_of(config, _KEEP),
      (Part("source", published.ANY_FORMAT,
            Table(tuple(_trunk_rows(family)), _IGNORED),
            published.trunk_shapes(family.trunk)),
       Part("vq", cosmos.FILES,
            Table(tuple(cosmos.rows(vq)), cosmos.ignored(vq)), vq_shapes(vq))),
      (config.tokenizer,), family,
  )


def _trunk_rows(family: SimpleAR) -> Iterable[Row]:
  cfg = family.trunk
  size = (cfg.vocab_in, cfg.d_model)
  yield table_rows(_TABLE, *size)
  yield from llama_layers(cfg, "model.")
  yield image_head("lm_head.weight", size, cfg.vocab_in - cfg.vocab_out,
                   cfg.vocab_out, tied=_TABLE)
