"""Recipe for published checkpoints of Janus-Pro."""

from collections.abc import Iterable
import math

import ml_collections
import numpy as np
from scipy.special import erf

from ssd_jax.convert.recipes import (
  Part,
  Recipe,
  Row,
  Source,
  Table,
  copy,
  linear,
  llama_layers,
  table_rows,
  vq_shapes,
)
from ssd_jax.convert.vq_recipes import vq_rows
from ssd_jax.families import published
from ssd_jax.families.janus import Janus

_CODE_DIM = 8  # width of the input table of image tokens
_PIECE = 1024  # rows processed at a time
_KEEP = ("trunk", "vq", "theta", "side", "sampling", "tokenizer")
_IGNORED = (
    r"language_model\.lm_head\.weight", r"vision_model\..*", r"aligner\..*",
    r"gen_vision_model\.quantize\.codebook_used",
    r".*rotary_emb\.inv_freq",
)


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a model folder."""
  family = Janus(config)
  vq = family.vq.cfg
  rows = (*_trunk_rows(family), *vq_rows(vq, "raster", "gen_vision_model."))
  part = Part("source", published.ANY_FORMAT, Table(rows, _IGNORED),
              published.trunk_shapes(family.trunk) | vq_shapes(vq))
  return Recipe(config.family, published.settings_of(config, _KEEP), (part,),
                (config.tokenizer,), family)


def _trunk_rows(family: Janus) -> Iterable[Row]:
  cfg = family.trunk
  d, vocab, hidden = cfg.d_model, cfg.vocab_out, cfg.head_hidden
  yield table_rows("language_model.model.embed_tokens.weight",
                   family.text_rows, d)
  yield Row(
      "trunk/embedding",
      (Source("gen_embed.weight", (vocab, _CODE_DIM)),
       Source("gen_aligner.layers.0.weight", (d, _CODE_DIM)),
       Source("gen_aligner.layers.0.bias", (d,)),
       Source("gen_aligner.layers.2.weight", (d, d)),
       Source("gen_aligner.layers.2.bias", (d,))),
      aligned_embeddings, at=family.text_rows)
  yield from llama_layers(cfg, "language_model.model.")
  for ours, name, shape in (
      ("head_in", "output_mlp_projector", (hidden, d)),
      ("head", "vision_head", (vocab, hidden))):
    name = f"gen_head.{name}"
    yield Row(f"trunk/{ours}", (Source(f"{name}.weight", shape),), linear)
    yield Row(f"trunk/{ours}_bias", (Source(f"{name}.bias", shape[:1]),), copy)


def aligned_embeddings(table, weight_0, bias_0, weight_2, bias_2) -> np.ndarray:
  """Returns image token embeddings after both linear layers, float32 [V, D].

  The layers have a GELU between them.

  Args:
    table: Published embeddings of image tokens.
    weight_0: Weights of the first layer.
    bias_0: Biases of the first layer.
    weight_2: Weights of the second layer.
    bias_2: Biases of the second layer.
  """
  x, w0, b0, w2, b2 = (
      a.astype(np.float32) for a in (table, weight_0, bias_0, weight_2, bias_2))
  y = x @ w0.T + b0
  for start in range(0, len(y), _PIECE):  # limits the memory for float64
    part = y[start:start + _PIECE].astype(np.float64)
    y[start:start + _PIECE] = part * 0.5 * (1.0 + erf(part / math.sqrt(2.0)))
  return y @ w2.T + b2
