"""Published names of T5's tensors; only those of the encoder are used."""

from collections.abc import Iterable

import jax
import numpy as np

from ssd_jax.convert.recipes import (
    Row,
    Source,
    copy,
    join_heads,
    linear,
    split_heads,
)
from ssd_jax.core.weights import leaves_by_path
from ssd_jax.models.t5 import T5Config, T5Encoder

FILES = (
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "model*.safetensors", "pytorch_model*.bin")
IGNORED = (r"decoder\..*", r"lm_head\.weight",
           r"encoder\.embed_tokens\.weight")


def shapes(cfg: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of an encoder's arrays by path."""
  shape = lambda dtype: jax.ShapeDtypeStruct((1, 1), dtype)
  init = T5Encoder(cfg).init
  variables = jax.eval_shape(
      init, jax.random.key(0), shape(np.int32), shape(np.bool_))
  return leaves_by_path(variables["params"], "text")


def rows(cfg: T5Config) -> Iterable[Row]:
  """Yields the rows of an encoder."""
  d, f, n = cfg.d_model, cfg.d_ff, cfg.n_heads
  inner = n * cfg.head_dim
  yield Row("text/embedding", (Source("shared.weight", (cfg.vocab, d)),))
  for i in range(cfg.n_layers):
    at = f"encoder.block.{i}.layer"
    row = lambda target, name, shape, convert, i=i, at=at: Row(
        f"text/layers/{target}", (Source(f"{at}.{name}.weight", shape),),
        convert, i)
    for ours in "qkv":
      yield row(ours, f"0.SelfAttention.{ours}", (inner, d), split_heads(n))
    yield row("o", "0.SelfAttention.o", (d, inner),
              join_heads(n))
    for ours, name, shape in (("gate", "wi_0", (f, d)), ("up", "wi_1", (f, d)),
                              ("down", "wo", (d, f))):
      yield row(ours, f"1.DenseReluDense.{name}", shape, linear)
    for ours, index in (("attn_norm", 0), ("mlp_norm", 1)):
      yield row(f"{ours}/scale", f"{index}.layer_norm", (d,), copy)
  yield Row("text/final_norm/scale", (
      Source("encoder.final_layer_norm.weight", (d,)),))
  name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  yield Row("text/distance", (Source(name, (cfg.buckets, n)),))
