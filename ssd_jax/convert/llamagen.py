"""Recipe for published checkpoints of LlamaGen."""

from collections.abc import Iterable
import functools

import ml_collections
import numpy as np

from ssd_jax.convert import t5_recipes
from ssd_jax.convert.recipes import (
  Part,
  Recipe,
  Row,
  Source,
  Table,
  chain,
  copy,
  linear,
  native_layers,
  split_heads,
  table_rows,
  vq_shapes,
)
from ssd_jax.convert.vq_recipes import vq_rows
from ssd_jax.core.config import from_config_dict
from ssd_jax.families import published
from ssd_jax.families.llamagen import LlamaGen
from ssd_jax.models.t5 import T5Config
from ssd_jax.models.transformer import TrunkConfig

_KEEP = ("trunk", "vq", "t5", "theta", "classes", "side", "sampling",
         "tokenizer")


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder."""
  family = LlamaGen(config)
  vq = family.vq.cfg
  parts = [
      Part("source", (config.file, f"**/{config.file}"),
           Table(tuple(_trunk_rows(family)), (r"freqs_cis",)),
           published.trunk_shapes(family.trunk)),
      Part("vq", (config.vq_file, f"**/{config.vq_file}"),
           Table(tuple(vq_rows(vq, "raster")), (r"quantize\.codebook_used",)),
           vq_shapes(vq)),
  ]
  if config.classes:
    return Recipe(config.family, published.settings_of(config, _KEEP),
                  tuple(parts))
  t5 = from_config_dict(T5Config, config.t5)
  parts.append(Part("text_encoder", t5_recipes.FILES,
                    Table(tuple(t5_recipes.rows(t5)), t5_recipes.IGNORED),
                    t5_recipes.shapes(t5)))
  return Recipe(config.family, published.settings_of(config, _KEEP),
                tuple(parts), (config.tokenizer,), family)


def _trunk_rows(family: LlamaGen) -> Iterable[Row]:
  cfg = family.trunk
  d = cfg.d_model
  conditions = cfg.vocab_in - cfg.vocab_out
  if conditions:
    yield table_rows("cls_embedding.embedding_table.weight", conditions, d)
  else:
    yield from _caption_rows(cfg)
  yield table_rows("tok_embeddings.weight", cfg.vocab_out, d, conditions)
  yield from native_layers(cfg, _attention_rows(cfg))
  yield Row("trunk/head", (Source("output.weight", (cfg.vocab_out, d)),),
            linear)


def _caption_rows(cfg: TrunkConfig) -> Iterable[Row]:
  e, d = cfg.caption_dim, cfg.d_model
  null = Source("cls_embedding.uncond_embedding", (cfg.caption_slots, e))
  yield Row("trunk/caption_null", (null,), copy)
  for ours, name, shape in (("in", "fc1", (d, e)), ("out", "fc2", (d, d))):
    source = Source(f"cls_embedding.cap_proj.{name}.weight", shape)
    yield Row(f"trunk/caption_{ours}", (source,), linear)


def _attention_rows(cfg: TrunkConfig) -> Iterable[Row]:
  """Yields rows of q, k and v, which are stacked in one published array."""
  counts = (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)
  ends = np.cumsum(counts) * cfg.head_dim
  for i in range(cfg.n_layers):
    source = Source(f"layers.{i}.attention.wqkv.weight",
                    (int(ends[-1]), cfg.d_model))
    for ours, n, end in zip("qkv", counts, ends, strict=True):
      part = functools.partial(_rows, int(end) - n * cfg.head_dim, int(end))
      yield Row(f"trunk/layers/attn/{ours}", (source,),
                chain(part, split_heads(n)), i)


def _rows(start: int, stop: int, x: np.ndarray) -> np.ndarray:
  return x[start:stop]
