"""Which published tensors become which of our arrays, and how.

A table is a list of rows; a row fills one array of our tree, or one layer of a
stacked one, or some of its leading rows. The published shapes stand in the
table, so that a wrong checkpoint is found before anything is read.

torch Linear weights are (out, in), ours (in, out); convolutions (O, I, h, w)
become (h, w, I, O).
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.weights import leaves_by_path
from ssd_jax.models.transformer import TrunkConfig
from ssd_jax.models.vq import VQ, VQConfig


@dataclasses.dataclass(frozen=True)
class Source:
  """A published tensor.

  Attributes:
    name: In the checkpoint.
    shape: As published.
    others: Other shapes that it is known to have.
    rows: (start, stop) of the leading rows that are taken; None for all.
  """

  name: str
  shape: tuple[int, ...]
  others: tuple[tuple[int, ...], ...] = ()
  rows: tuple[int, int] | None = None


def copy(x: np.ndarray) -> np.ndarray:
  """The array as it is; tables of this kind are copied in pieces."""
  return x


@dataclasses.dataclass(frozen=True)
class Row:
  """One array of ours, or a part of it.

  Attributes:
    target: Path of the array, such as "trunk/layers/attn/q".
    sources: Published tensors it is made of.
    convert: From their arrays to ours.
    layer: Index on the leading axis of a stacked array, or None.
    at: First row to be filled, in tables made of several.
  """

  target: str
  sources: tuple[Source, ...]
  convert: Callable[..., np.ndarray] = copy
  layer: int | None = None
  at: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
  """What one checkpoint is made of.

  Attributes:
    rows: Which tensor goes where.
    ignored: Regular expressions of tensors that are of no use here.
  """

  rows: tuple[Row, ...]
  ignored: tuple[str, ...] = ()


def linear(x: np.ndarray) -> np.ndarray:
  """(out, in) -> (in, out)."""
  return x.T


def split_heads(n: int) -> Callable[[np.ndarray], np.ndarray]:
  """(n heads of H, D) -> (D, n, H)."""
  return lambda x: x.T.reshape(x.shape[1], n, -1)


def join_heads(n: int) -> Callable[[np.ndarray], np.ndarray]:
  """(D, n heads of H) -> (n, H, D)."""
  return lambda x: x.T.reshape(n, -1, x.shape[0])


def halves(n: int) -> Callable[[np.ndarray], np.ndarray]:
  """Rows of n heads from interleaved rotary pairs to halves.

  Row 2j of a head becomes row j, row 2j + 1 row j + H / 2.
  """
  def permute(x: np.ndarray) -> np.ndarray:
    pairs = x.reshape(n, x.shape[0] // n // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)

  return permute


def repeat_heads(n: int, head_dim: int) -> Callable[[np.ndarray], np.ndarray]:
  """One row of head_dim, or one per shard of heads -> one per head (n, H)."""
  def repeat(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, head_dim)
    return np.repeat(x, n // x.shape[0], axis=0)

  return repeat


def conv(x: np.ndarray) -> np.ndarray:
  """(O, I, h, w) -> (h, w, I, O)."""
  return x.transpose(2, 3, 1, 0)


def chain(*steps: Callable) -> Callable[[np.ndarray], np.ndarray]:
  """The functions one after the other."""
  def run(x):
    for step in steps:
      x = step(x)
    return x

  return run


def llama_layers(cfg: TrunkConfig, prefix: str) -> Iterable[Row]:
  """Layers and final norm named as in transformers' Llama."""
  d, f, h = cfg.d_model, cfg.d_ff, cfg.head_dim
  for i in range(cfg.n_layers):
    at = lambda name, i=i: f"{prefix}layers.{i}.{name}"
    row = lambda target, name, shape, convert, i=i: Row(
        f"trunk/layers/{target}",
        (Source(f"{prefix}layers.{i}.{name}.weight", shape),), convert, i)
    for ours, n in (("q", cfg.n_heads), ("k", cfg.n_kv_heads),
                    ("v", cfg.n_kv_heads)):
      yield row(f"attn/{ours}", f"self_attn.{ours}_proj", (n * h, d),
                split_heads(n))
    yield row("attn/o", "self_attn.o_proj", (d, cfg.n_heads * h),
              join_heads(cfg.n_heads))
    for ours, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
      yield row(f"mlp/{ours}", f"mlp.{ours}_proj", shape, linear)
    yield row("attn_norm/scale", "input_layernorm", (d,), copy)
    yield row("mlp_norm/scale", "post_attention_layernorm", (d,), copy)
    if cfg.qk_norm:
      yield from _head_norms(cfg, i, at)
  yield Row("trunk/final_norm/scale", (Source(f"{prefix}norm.weight", (d,)),))


def _head_norms(cfg: TrunkConfig, layer: int, at) -> Iterable[Row]:
  h = cfg.head_dim
  for ours, n in (("q", cfg.n_heads), ("k", cfg.n_kv_heads)):
    for part, name in (("scale", "weight"), ("bias", "bias")):
      yield Row(
          f"trunk/layers/attn/{ours}_norm/{part}",
          (Source(at(f"self_attn.{ours}_norm.{name}"), (1, h),
                  ((n, h), (h,))),),
          repeat_heads(n, h), layer)


def native_layers(cfg: TrunkConfig, qkv: Iterable[Row]) -> Iterable[Row]:
  """Layers named as in Meta's Llama, attention's inputs given by `qkv`."""
  d, f = cfg.d_model, cfg.d_ff
  yield from qkv
  for i in range(cfg.n_layers):
    row = lambda target, name, shape, convert, i=i: Row(
        f"trunk/layers/{target}",
        (Source(f"layers.{i}.{name}.weight", shape),), convert, i)
    yield row("attn/o", "attention.wo", (d, cfg.n_heads * cfg.head_dim),
              join_heads(cfg.n_heads))
    for ours, name, shape in (("gate", "w1", (f, d)), ("up", "w3", (f, d)),
                              ("down", "w2", (d, f))):
      yield row(f"mlp/{ours}", f"feed_forward.{name}", shape, linear)
    yield row("attn_norm/scale", "attention_norm", (d,), copy)
    yield row("mlp_norm/scale", "ffn_norm", (d,), copy)
  yield Row("trunk/final_norm/scale", (Source("norm.weight", (d,)),))


def table_rows(name: str, rows: int, width: int, at: int = 0) -> Row:
  """A published input table as (part of) ours."""
  return Row("trunk/embedding", (Source(name, (rows, width)),), at=at)


def image_head(
    name: str, published: tuple[int, int], first: int, count: int
) -> Row:
  """The rows of image codes of a head over a joint vocabulary."""
  source = Source(name, published, rows=(first, first + count))
  return Row("trunk/head", (source,), linear)


@functools.cache
def vq_shapes(cfg: VQConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """The arrays of a tokenizer by path."""
  size = cfg.downsample
  image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
  params = jax.eval_shape(VQ(cfg).init, jax.random.key(0), image)["params"]
  return leaves_by_path(params, "vq")


@dataclasses.dataclass(frozen=True)
class Part:
  """One published checkpoint of a model.

  Attributes:
    flag: Of the command line, that says where it is: "source", "vq" or
      "text_encoder".
    patterns: Its files in the place that the flag names, as globs tried in
      order.
    table: What is in it.
    leaves: Our arrays that it fills, by path.
    in_source: Its files in the place of "source", where the flag is not given;
      empty if they are named the same.
  """

  flag: str
  patterns: tuple[str, ...]
  table: Table
  leaves: dict[str, jax.ShapeDtypeStruct]
  in_source: tuple[str, ...] = ()

  @property
  def source_patterns(self) -> tuple[str, ...]:
    """Its files in the place of "source"."""
    return self.in_source or self.patterns


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a family's model folder is made.

  Attributes:
    family: Its name.
    settings: What model.json holds beside the name.
    parts: The checkpoints.
    tokenizer: Files of the tokenizer, as globs; each must be found.
  """

  family: str
  settings: dict[str, Any]
  parts: tuple[Part, ...]
  tokenizer: tuple[str, ...] = ()

  def without_text_encoder(self) -> "Recipe":
    """The recipe of a folder whose prompts are features, not words."""
    parts = tuple(p for p in self.parts if p.flag != "text_encoder")
    if parts == self.parts:
      raise UserError(
          f"Expected it for captions of llamagen, not for {self.family}, got "
          "--text_encoder none. Leave it out.")
    return dataclasses.replace(self, parts=parts, tokenizer=())
