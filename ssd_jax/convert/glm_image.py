"""Recipe for published checkpoints of GLM-Image's autoregressive stage."""

from collections.abc import Iterable
import dataclasses

import ml_collections

from ssd_jax.convert.recipes import (
  Part,
  Recipe,
  Row,
  Source,
  Table,
  chain,
  copy,
  half_rotary,
  image_head,
  linear,
  llama_layers,
  table_rows,
)
from ssd_jax.families import published
from ssd_jax.families.glm_image import GLMImage

_KEEP = ("trunk", "head_rows", "theta", "sections", "ids", "size",
         "preview_side", "sampling", "tokenizer")
_PREFIX = "model.language_model."
_FOLDER = "vision_language_encoder/"
_FILES = (*(_FOLDER + name for name in published.SAFETENSORS),
          *published.SAFETENSORS)
_IGNORED = (r"model\.visual\..*", r"model\.vqmodel\..*",
            r".*rotary_emb\.(original_)?inv_freq")


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder.

  Raises:
    UserError: The size is unknown.
  """
  family = GLMImage(config)
  _ = family.grid, family.preview
  part = Part("source", _FILES, Table(tuple(_trunk_rows(family)), _IGNORED),
              published.trunk_shapes(family.trunk))
  return Recipe(config.family, published.settings_of(config, _KEEP), (part,),
                (f"**/{config.tokenizer}",), family)


def _trunk_rows(family: GLMImage) -> Iterable[Row]:
  cfg = family.trunk
  yield table_rows(f"{_PREFIX}embed_tokens.weight", cfg.vocab_in, cfg.d_model)
  for row in llama_layers(cfg, _PREFIX):
    name = row.target.removeprefix("trunk/layers/")
    heads = {"q": cfg.n_heads, "k": cfg.n_kv_heads}.get(
        name.removeprefix("attn/").removesuffix("_bias"))
    if heads:
      yield dataclasses.replace(
          row, convert=chain(half_rotary(heads), row.convert))
    elif name in ("mlp/gate", "mlp/up"):
      yield _half_of_gate_up(row, cfg.d_ff, cfg.d_model, name == "mlp/up")
    else:
      yield row
  for i in range(cfg.n_layers):
    for ours, theirs in (("attn", "self_attn"), ("mlp", "mlp")):
      source = Source(f"{_PREFIX}layers.{i}.post_{theirs}_layernorm.weight",
                      (cfg.d_model,))
      yield Row(f"trunk/layers/{ours}_post_norm/scale", (source,), copy, i)
  yield image_head("lm_head.weight", (family.config.head_rows, cfg.d_model), 0,
                   cfg.vocab_out)


def _half_of_gate_up(row: Row, hidden: int, width: int, is_up: bool) -> Row:
  """Returns the row of a half of the matrix that holds gate, then up."""
  name = row.sources[0].name.replace(
      "up_proj" if is_up else "gate_proj", "gate_up_proj")
  first = hidden * is_up
  source = Source(name, (2 * hidden, width), rows=(first, first + hidden))
  return dataclasses.replace(row, sources=(source,), convert=linear)
