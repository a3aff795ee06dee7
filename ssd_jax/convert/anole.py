"""Recipe for published checkpoints of Anole-7B.

The native checkpoint rotates adjacent pairs of a head's entries, transformers'
checkpoint pairs of the two halves; both become halves here.
"""

from collections.abc import Iterable

import ml_collections

from ssd_jax.convert.lumina import chameleon_vq, huggingface_rows
from ssd_jax.convert.recipes import (
  Part,
  Recipe,
  Row,
  Source,
  Table,
  chain,
  halves,
  image_head,
  native_layers,
  repeat_heads,
  split_heads,
  table_rows,
  vq_shapes,
)
from ssd_jax.convert.vq_recipes import vq_rows
from ssd_jax.families import published
from ssd_jax.families.anole import Anole
from ssd_jax.models.transformer import TrunkConfig

_KEEP = ("trunk", "vq", "theta", "ids", "side", "sampling", "tokenizer")
_NATIVE = ("**/consolidated.pth", "**/consolidated.*.pth")


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder."""
  family = Anole(config)
  settings = published.settings_of(config, _KEEP)
  shapes = published.trunk_shapes(family.trunk)
  if config.layout == "native":
    table = Table(tuple(_native_rows(family)), (r"rope\.freqs",))
    parts = (Part("source", _NATIVE, table, shapes),
             chameleon_vq(family))
    tokenizer = "**/" + config.tokenizer
    return Recipe(config.family, settings, parts, (tokenizer,), family)
  vq = family.vq.cfg
  rows = (*huggingface_rows(family),
          *vq_rows(vq, "taming", "model.vqmodel."))
  part = Part("source", published.ANY_FORMAT, Table(rows),
              shapes | vq_shapes(vq))
  return Recipe(config.family, settings, (part,), (config.tokenizer,),
                family)


def _native_rows(family: Anole) -> Iterable[Row]:
  cfg, ids = family.trunk, family.config.ids
  size = (cfg.vocab_in, cfg.d_model)
  yield table_rows("tok_embeddings.weight", *size)
  yield from native_layers(cfg, _attention_rows(cfg))
  yield image_head("output.weight", size, ids.first_code, cfg.vocab_out)


def _attention_rows(cfg: TrunkConfig) -> Iterable[Row]:
  d, h = cfg.d_model, cfg.head_dim
  for i in range(cfg.n_layers):
    at = f"layers.{i}.attention"
    for ours, n in (("q", cfg.n_heads), ("k", cfg.n_kv_heads)):
      target = f"trunk/layers/attn/{ours}"
      yield Row(target, (Source(f"{at}.w{ours}.weight", (n * h, d)),),
                chain(halves(n), split_heads(n)), i)
      for part, name in (("scale", "weight"), ("bias", "bias")):
        source = Source(f"{at}.{ours}_normalization.{name}", (h,))
        yield Row(f"{target}_norm/{part}", (source,),
                  chain(halves(1), repeat_heads(n, h)), i)
    n = cfg.n_kv_heads
    yield Row("trunk/layers/attn/v", (Source(f"{at}.wv.weight", (n * h, d)),),
              split_heads(n), i)
