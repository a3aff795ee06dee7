"""Recipes: how published tensors are converted to this package's arrays.

A table is a list of rows; a row fills one array of our tree, one layer of a
stacked array, or some leading rows of an array. The table contains the
published shapes, so a wrong checkpoint is detected before tensors are read.

Linear weights are (out, in) in torch and (in, out) here; convolutions
(O, I, h, w) become (h, w, I, O).
"""

from collections.abc import Callable, Container, Iterable
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.weights import leaves_by_path
from ssd_jax.families.published import Published
from ssd_jax.models.transformer import TrunkConfig
from ssd_jax.models.vq import VQ, VQConfig


@dataclasses.dataclass(frozen=True)
class Source:
  """A published tensor.

  Attributes:
    name: Name in the checkpoint.
    shape: Published shape.
    others: Other known shapes.
    rows: (start, stop) of the leading rows to use; None for all.
    otherwise: Name of the tensor to use in a checkpoint without this one, such
      as that of the input table for a tied head.
  """

  name: str
  shape: tuple[int, ...]
  others: tuple[tuple[int, ...], ...] = ()
  rows: tuple[int, int] | None = None
  otherwise: str = ""


def copy(x: np.ndarray) -> np.ndarray:
  """Returns the array unchanged; such arrays are copied in pieces."""
  return x


@dataclasses.dataclass(frozen=True)
class Row:
  """One of our arrays, or a part of it.

  Attributes:
    target: Path of the array, such as "trunk/layers/attn/q".
    sources: Published tensors that it is made of.
    convert: Function from the published arrays to ours.
    layer: Index on the leading axis of a stacked array, or None.
    at: First row to fill, for arrays made of several tensors.
    by_rows: Whether `convert` treats each row alone, so that the array can be
      converted in pieces.
  """

  target: str
  sources: tuple[Source, ...]
  convert: Callable[..., np.ndarray] = copy
  layer: int | None = None
  at: int = 0
  by_rows: bool = False

  @property
  def is_divisible(self) -> bool:
    """Whether the array can be converted in pieces of rows."""
    return self.layer is None and (self.by_rows or self.convert is copy)


@dataclasses.dataclass(frozen=True)
class Table:
  """The tensors of one checkpoint.

  Attributes:
    rows: Rows that use the tensors.
    ignored: Regular expressions of tensors that are not used.
  """

  rows: tuple[Row, ...]
  ignored: tuple[str, ...] = ()


def linear(x: np.ndarray) -> np.ndarray:
  """Transposes (out, in) -> (in, out)."""
  return x.T


def split_heads(n: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from (n * H, D) to (D, n, H)."""
  return lambda x: x.T.reshape(x.shape[1], n, -1)


def head_vectors(n: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from (n * H,) to (n, H)."""
  return lambda x: x.reshape(n, -1)


def join_heads(n: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from (D, n * H) to (n, H, D)."""
  return lambda x: x.T.reshape(n, -1, x.shape[0])


def halves(n: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from interleaved rotary pairs of n heads to halves.

  Row 2j of a head becomes row j, and row 2j + 1 becomes row j + H / 2.
  """
  def permute(x: np.ndarray) -> np.ndarray:
    pairs = x.reshape(n, x.shape[0] // n // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)

  return permute


def half_rotary(n: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that moves the rotated half of n heads.

  Pairs (j, j + H / 4) of the first half of a head become (j, j + H / 2), as if
  the whole head rotated; its other entries become the pairs that do not.
  """
  def permute(x: np.ndarray) -> np.ndarray:
    quarters = x.reshape(n, 2, 2, x.shape[0] // n // 4, *x.shape[1:])
    return quarters.swapaxes(1, 2).reshape(x.shape)

  return permute


def repeat_heads(n: int, head_dim: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that repeats rows to one per head, (n, H).

  Its input has one row, or one row per shard of heads.
  """
  def repeat(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, head_dim)
    return np.repeat(x, n // x.shape[0], axis=0)

  return repeat


def conv(x: np.ndarray) -> np.ndarray:
  """Transposes (O, I, h, w) -> (h, w, I, O)."""
  return x.transpose(2, 3, 1, 0)


def chain(*steps: Callable) -> Callable[[np.ndarray], np.ndarray]:
  """Composes functions; the first one is applied first."""
  def run(x):
    for step in steps:
      x = step(x)
    return x

  return run


def llama_layers(cfg: TrunkConfig, prefix: str) -> Iterable[Row]:
  """Yields rows of layers and final norm, named as in transformers' Llama."""
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
      if cfg.qkv_bias:
        yield Row(f"trunk/layers/attn/{ours}_bias",
                  (Source(at(f"self_attn.{ours}_proj.bias"), (n * h,)),),
                  head_vectors(n), i)
      if cfg.qk_rms and ours != "v":
        yield row(f"attn/{ours}_rms/scale", f"self_attn.{ours}_norm", (h,),
                  copy)
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
  """Yields rows of layers and final norm, named as in Meta's Llama.

  Args:
    cfg: Config of the trunk.
    qkv: Rows of the matrices q, k and v.
  """
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
  """Returns the row of a published input table, which is all or part of ours.

  Args:
    name: Name of the published tensor.
    rows: Its number of rows.
    width: Width D.
    at: First row of our table to fill.
  """
  return Row("trunk/embedding", (Source(name, (rows, width)),), at=at)


def image_head(
    name: str, published: tuple[int, int], first: int, count: int,
    tied: str = "",
) -> Row:
  """Returns the row of our head, the image tokens' part of a published head.

  Args:
    name: Name of the published head, over a joint vocabulary.
    published: Its shape.
    first: Id of the first image token.
    count: Number of image tokens.
    tied: Name of the input table, if the head may be tied to it.
  """
  source = Source(name, published, rows=(first, first + count), otherwise=tied)
  return Row("trunk/head", (source,), linear)


@functools.cache
def vq_shapes(cfg: VQConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a tokenizer's arrays by path."""
  size = cfg.downsample
  image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
  params = jax.eval_shape(VQ(cfg).init, jax.random.key(0), image)["params"]
  return leaves_by_path(params, "vq")


@dataclasses.dataclass(frozen=True)
class Part:
  """One published checkpoint of a model.

  Attributes:
    flag: Command line flag of its location: "source", "vq" or "text_encoder".
    patterns: Its files at the flag's location, as globs tried in order.
    table: Its tensors.
    leaves: Shapes of our arrays that it fills, by path.
    in_source: Its files at the location of "source", used if the flag is not
      given; empty if they equal `patterns`.
  """

  flag: str
  patterns: tuple[str, ...]
  table: Table
  leaves: dict[str, jax.ShapeDtypeStruct]
  in_source: tuple[str, ...] = ()

  @functools.cached_property
  def names(self) -> frozenset[str]:
    """Names of the published tensors that are used."""
    return frozenset(s.name for row in self.table.rows for s in row.sources)

  @functools.cached_property
  def required(self) -> frozenset[str]:
    """Names of the tensors that every checkpoint has."""
    return frozenset(s.name for row in self.table.rows for s in row.sources
                     if not s.otherwise)

  def resolved(self, present: Container[str]) -> "Part":
    """Returns the part for a checkpoint with tensors of these names."""
    def resolve(row: Row) -> Row:
      sources = tuple(
          dataclasses.replace(s, name=s.otherwise)
          if s.otherwise and s.name not in present else s for s in row.sources)
      return dataclasses.replace(row, sources=sources)

    rows = tuple(map(resolve, self.table.rows))
    return dataclasses.replace(
        self, table=dataclasses.replace(self.table, rows=rows))

  @property
  def source_patterns(self) -> tuple[str, ...]:
    """Its files at the location of "source", as globs."""
    return self.in_source or self.patterns


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The recipe of a family's model folder.

  Attributes:
    family: Name of the family.
    settings: Contents of model.json beside the name.
    parts: The published checkpoints.
    tokenizer: Files of the text tokenizer, as globs; each must match.
    speller: The family, which tries these files.
  """

  family: str
  settings: dict[str, Any]
  parts: tuple[Part, ...]
  tokenizer: tuple[str, ...] = ()
  speller: Published | None = None

  def without_text_encoder(self) -> "Recipe":
    """Returns the recipe of a folder whose prompts are features, not text."""
    parts = tuple(p for p in self.parts if p.flag != "text_encoder")
    if parts == self.parts:
      raise UserError(
          "Expected --text_encoder none only for a family with a text encoder, "
          f"got --text_encoder none for {self.family}. Omit it.")
    return dataclasses.replace(self, parts=parts, tokenizer=())
