"""SSD's spatial heads: small predictors of the trunk's own hidden states.

A head looks at a cell, at the state that predicted it and at the token that was
drawn there, and predicts the state of the cell `offset` to the right or below.
The frozen final norm and head of the trunk turn that into a distribution.

Source: SSD, arXiv:2606.20543, section 3.2, equation 2; the options that are not
the default are those of its table 3.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError, check
from ssd_jax.core.types import Model, Params
from ssd_jax.models import quantization
from ssd_jax.models.fingerprint import fingerprint, same_trunk
from ssd_jax.models.generator import Generator
from ssd_jax.runtime import sharding

DIRECTIONS = ("horizontal", "vertical")
INPUTS = ("h", "h+e", "e")
TARGETS = ("pre", "post", "embedding", "token", "distribution")


@dataclasses.dataclass(frozen=True)
class HeadsOptions:
  """Which heads there are.

  Attributes:
    horizontal: Heads of the offsets 1 .. horizontal in the row.
    vertical: Heads of the offsets 1 .. vertical in the column.
    inputs: "h+e", the hidden state and the embedding; "h" or "e" alone.
    target: What is predicted, and so how it is decoded: "pre", the hidden state
      before the final norm; "post", after it (then the input is so too);
      "embedding", of the token; "token", as "pre" but trained on the token;
      "distribution", on all that the trunk says of it (distillation: ours).
    wrap: Horizontal pairs run on into the next row, as in one-dimensional
      multi-token prediction; else they end with the row.
  """

  horizontal: int = 5
  vertical: int = 2
  inputs: str = "h+e"
  target: str = "pre"
  wrap: bool = False

  def __post_init__(self):
    for name in DIRECTIONS:
      check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
    check(self.horizontal + self.vertical > 0, "horizontal + vertical", 0,
          "at least one head")
    check(self.inputs in INPUTS, "inputs", repr(self.inputs),
          f"one of {INPUTS}")
    check(self.target in TARGETS, "target", repr(self.target),
          f"one of {TARGETS}")


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
  """Heads and the trunk they belong to; what is stored beside their weights.

  Attributes:
    options: Which heads there are.
    d_model: Width D of the trunk.
    vocab: Image codes V.
    rows: Of the grid.
    cols: Of the grid.
    end_of_row: Whether the grid has end-of-row tokens.
    trunk: Some of the trunk's weights, by which it is known again; empty for
      any trunk.
  """

  options: HeadsOptions
  d_model: int
  vocab: int
  rows: int
  cols: int
  end_of_row: bool
  trunk: tuple[float, ...] = ()

  @classmethod
  def make(
      cls, generator: Generator, options: HeadsOptions,
      params: Params | None = None,
  ) -> "HeadsConfig":
    """Heads of a generator, tied to its weights where they are given."""
    grid = generator.grid
    trunk = () if params is None else fingerprint(params["trunk"])
    return cls(
        options, generator.cfg.d_model, generator.cfg.vocab_out, grid.rows,
        grid.cols, grid.end_of_row, trunk,
    )

  def count(self, direction: str) -> int:
    """Heads of a direction."""
    return getattr(self.options, direction)


class Predictors(nn.Module):
  """The heads of one direction, their weights stacked by offset.

  u = W0 z; u + W2 (silu(W1 v) * W3 v) with v = RMSNorm(u), all bias-free, inner
  width 2 D.

  Attributes:
    offsets: Number of heads n.
    width: D of the output.
    norm_eps: Of RMSNorm.
  """

  offsets: int
  width: int
  norm_eps: float = 1e-5

  @nn.compact
  def __call__(self, z: jax.Array, offset: int | None = None) -> jax.Array:
    """[n, ..., D] of inputs [..., Z]; of one head (n = 1) with `offset`."""
    wanted = slice(None) if offset is None else slice(offset - 1, offset)
    init = nn.initializers.variance_scaling(
        1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0
    )

    def weight(name, rows, cols):
      w = self.param(name, init, (self.offsets, rows, cols))
      return w[wanted].astype(z.dtype)

    into = functools.partial(jnp.einsum, "n...d,ndf->n...f")
    inner = 2 * self.width
    z, w0 = sharding.replicate_axis(z), weight("w0", z.shape[-1], self.width)
    # Before the product with a single head XLA would turn its weights around.
    u = into(z[None], w0) if len(w0) == 1 else jnp.einsum(
        "...z,nzd->n...d", z, w0)
    u = sharding.replicate_axis(u)
    scale = self.param(
        "scale", nn.initializers.ones, (self.offsets, self.width)
    )[wanted]
    v = u.astype(jnp.float32)
    v *= jax.lax.rsqrt(jnp.mean(v**2, -1, keepdims=True) + self.norm_eps)
    v *= scale.reshape(-1, *(1,) * (z.ndim - 1), self.width)
    v = v.astype(z.dtype)
    gate = nn.silu(into(v, weight("w1", self.width, inner)))
    up = into(v, weight("w3", self.width, inner))
    return sharding.replicate_axis(
      u + into(gate * up, weight("w2", inner, self.width))
    )


@dataclasses.dataclass(frozen=True, eq=False)
class SpatialHeads:
  """Heads bound to a trunk. `params` holds "trunk" and "heads".

  Attributes:
    generator: The trunk.
    cfg: The heads.
  """

  generator: Generator
  cfg: HeadsConfig

  def init(self, key: jax.Array) -> Params:
    """Random float32 weights: {direction: {name: [n, ...]}}."""
    parts = len(self.cfg.options.inputs.split("+"))
    z = jnp.zeros((1, parts * self.cfg.d_model))
    keys = dict(zip(DIRECTIONS, jax.random.split(key), strict=True))
    return {
        name: jax.jit(self._module(self.cfg.count(name)).init)(
            keys[name], z)["params"]
        for name in DIRECTIONS if self.cfg.count(name)
    }

  def predict(
      self, params: Params, direction: str, hidden: jax.Array,
      tokens: jax.Array, offset: int | None = None,
  ) -> jax.Array:
    """[n, ..., D]: what all heads of a direction, or one, predict.

    Args:
      params: Of trunk and heads; these stacked, or apart (models/apart.py).
      direction: "horizontal" or "vertical".
      hidden: [..., D], the state that predicted `tokens`, before the norm.
      tokens: int32 [...], drawn there.
      offset: Of the only head wanted; None for all.
    """
    choice, parts = self.cfg.options, []
    if "h" in choice.inputs:
      parts.append(self._normalized(params, hidden))
    if "e" in choice.inputs:
      parts.append(self.generator.embed(params, tokens).astype(hidden.dtype))
    z = jnp.concatenate(parts, -1)
    apply = lambda count, weights, *which: self._module(count).apply(
        {"params": quantization.dequantize(weights)}, z, *which)
    weights = params["heads"][direction]
    if isinstance(weights, Mapping):
      return apply(self.cfg.count(direction), weights, offset)
    wanted = weights if offset is None else [weights[offset - 1]]
    return jnp.concatenate([apply(1, each) for each in wanted])

  def goal(
      self, params: Params, hidden: jax.Array, tokens: jax.Array
  ) -> jax.Array:
    """[..., D]: what a head aimed at these cells should predict."""
    if self.cfg.options.target == "embedding":
      return self.generator.embed(params, tokens)
    return self._normalized(params, hidden)

  def logits(self, params: Params, predicted: jax.Array) -> jax.Array:
    """float32 [..., V] of predictions."""
    target = self.cfg.options.target
    if target == "post":
      return self.generator.project(params, predicted)
    if target == "embedding":
      return self._nearness(params, predicted)
    return self.generator.logits(params, predicted)

  def draft(
      self, params: Params, direction: str, offset: int | None,
      hidden: jax.Array, tokens: jax.Array,
  ) -> jax.Array:
    """float32 logits [..., V] of one offset; [n, ..., V] of all if None."""
    logits = self.logits(
        params, self.predict(params, direction, hidden, tokens, offset)
    )
    return sharding.replicate_axis(logits if offset is None else logits[0])

  def model(self) -> Model:
    """The generator's functions with drafting."""
    horizontal, vertical = (self.cfg.count(name) for name in DIRECTIONS)
    return dataclasses.replace(
        self.generator.model(), draft=self.draft, heads=(horizontal, vertical))

  def _module(self, offsets: int) -> Any:
    return Predictors(
        offsets, self.cfg.d_model, self.generator.cfg.norm_eps)

  def _normalized(self, params: Params, hidden: jax.Array) -> jax.Array:
    if self.cfg.options.target == "post":
      return self.generator.normalize(params, hidden)
    return hidden[..., :self.cfg.d_model]  # without what a drafter tapped

  def _nearness(self, params: Params, predicted: jax.Array) -> jax.Array:
    """Log-density of each code's embedding around a predicted one.

    The spread per entry is that of the table itself: the paper names no
    decoding of predicted embeddings, and this one has nothing to tune.
    """
    codes = jnp.arange(self.cfg.vocab)
    table = self.generator.embed(params, codes).astype(jnp.float32)
    nearness = predicted.astype(jnp.float32) @ table.T
    nearness -= 0.5 * jnp.sum(table**2, axis=-1)
    return nearness / jnp.mean(jnp.var(table, axis=0))


def bind_heads(
    generator: Generator, cfg: HeadsConfig, params: Params | None = None
) -> Model:
  """The generator's model with `draft` and `heads`; use it for all calls.

  Args:
    generator: The trunk.
    cfg: The heads.
    params: Of trunk and heads, to check that they belong together.

  Raises:
    UserError: when the heads are another trunk's, grid's or offset set's.
  """
  check_heads(generator, cfg, params)
  return SpatialHeads(generator, cfg).model()


def check_heads(
    generator: Generator, cfg: HeadsConfig, params: Params | None = None
) -> None:
  """Raises UserError unless heads and trunk belong together."""
  own = HeadsConfig.make(generator, cfg.options)
  for name, what in (("d_model", "width"), ("vocab", "codebook size")):
    got, expected = getattr(cfg, name), getattr(own, name)
    _require(got == expected, f"{what} {got}", f"{expected}")
  _require(_grid_of(cfg) == _grid_of(own), _grid_of(cfg), _grid_of(own))
  if params is None:
    return
  _require(
      same_trunk(cfg.trunk, fingerprint(params["trunk"])),
      "another trunk's weights", "those of this trunk",
  )
  heads = SpatialHeads(generator, cfg)
  wanted = jax.eval_shape(heads.init, jax.random.key(0))
  _require(
      _shapes(params["heads"]) == _shapes(wanted),
      f"weights of other offsets than {cfg.options}", "weights that fit it",
  )


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
  return {
      jax.tree_util.keystr(path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _grid_of(cfg: HeadsConfig) -> str:
  ends = " with end-of-row tokens" if cfg.end_of_row else ""
  return f"a {cfg.rows}x{cfg.cols} grid{ends}"


def _require(ok: bool, got: str, expected: str) -> None:
  if not ok:
    raise UserError(
        f"Expected {expected}, got spatial heads for {got}. Train heads for "
        "this model with train.mtp."
    )
