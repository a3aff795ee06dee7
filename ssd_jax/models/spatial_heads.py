"""SSD's spatial heads: small predictors of the trunk's hidden states.

A head takes the token at a grid position and the hidden state that predicted
it, and predicts the hidden state of the token `offset` positions to the right
or below. The trunk's frozen final norm and head turn it into a distribution.

Source: SSD, arXiv:2606.20543, section 3.2, equation 2; the non-default options
are those of its table 3.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError, check, check_sizes
from ssd_jax.core.types import Model, Params
from ssd_jax.models import quantization
from ssd_jax.models.fingerprint import (
  check_fingerprint,
  fingerprint,
  same_trunk,
)
from ssd_jax.models.generator import Generator
from ssd_jax.runtime import sharding

DIRECTIONS = ("horizontal", "vertical")
INPUTS = ("h", "h+e", "e")
TARGETS = ("pre", "post", "embedding", "token", "distribution")


@dataclasses.dataclass(frozen=True)
class HeadsOptions:
  """Numbers and options of the heads.

  Attributes:
    horizontal: Number of horizontal heads, for offsets 1 .. horizontal.
    vertical: Number of vertical heads, for offsets 1 .. vertical.
    inputs: "h+e", the hidden state and the token's embedding; "h" or "e" alone.
    target: What the heads predict, which determines how predictions are
      decoded: "pre", the hidden state before the final norm; "post", the hidden
      state after it (also of the input); "embedding", the token's embedding;
      "token", as "pre" but trained on the token; "distribution", as "pre" but
      trained on the trunk's distribution (distillation: ours).
    wrap: Whether horizontal offsets continue in the next row, as in
      one-dimensional multi-token prediction, instead of ending with the row.
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
  """The heads and the trunk they belong to; stored beside their weights.

  Attributes:
    options: Numbers and options of the heads.
    d_model: Width D of the trunk.
    vocab: Number of image tokens V.
    rows: Rows of the grid.
    cols: Columns of the grid.
    end_of_row: Whether the grid has end-of-row tokens.
    trunk: Fingerprint of the trunk; empty for any trunk.
  """

  options: HeadsOptions
  d_model: int
  vocab: int
  rows: int
  cols: int
  end_of_row: bool
  trunk: tuple[float, ...] = ()

  def __post_init__(self):
    check_sizes(self)
    check_fingerprint(self.trunk)

  @classmethod
  def make(
      cls, generator: Generator, options: HeadsOptions,
      params: Params | None = None,
  ) -> "HeadsConfig":
    """Returns the config of a generator's heads.

    Args:
      generator: The trunk.
      options: Numbers and options of the heads.
      params: Parameters of the trunk, which the heads are then tied to.
    """
    grid = generator.grid
    trunk = () if params is None else fingerprint(params["trunk"])
    return cls(
        options, generator.cfg.d_model, generator.cfg.vocab_out, grid.rows,
        grid.cols, grid.end_of_row, trunk,
    )

  def count(self, direction: str) -> int:
    """Returns the number of heads of a direction."""
    return getattr(self.options, direction)


class Predictors(nn.Module):
  """The heads of one direction, their weights stacked by offset.

  A head computes u = W0 z and then u + W2 (silu(W1 v) * W3 v), where
  v = RMSNorm(u); all are bias-free, and the inner width is 2 D.

  Attributes:
    offsets: Number of heads n.
    width: Output width D.
    norm_eps: Epsilon of RMSNorm.
  """

  offsets: int
  width: int
  norm_eps: float = 1e-5

  @nn.compact
  def __call__(self, z: jax.Array, offset: int | None = None) -> jax.Array:
    """Returns predictions [n, ..., D] for inputs z [..., Z].

    With an `offset`, only that head runs (n = 1).
    """
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
    # With "...z,nzd->n...d", XLA would transpose the weights of a single head.
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
    cfg: Config of the heads.
  """

  generator: Generator
  cfg: HeadsConfig

  def init(self, key: jax.Array) -> Params:
    """Returns random float32 weights, {direction: {name: [n, ...]}}."""
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
    """Runs one head or all heads of a direction.

    Args:
      params: Parameters of trunk and heads; heads may be stacked or unstacked
        (models/layouts.py).
      direction: "horizontal" or "vertical".
      hidden: [..., D], the states that predicted `tokens`, before the norm.
      tokens: int32 [...], generated tokens.
      offset: Offset of the head to run; None runs all heads.

    Returns:
      Predictions, [n, ..., D].
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
    """Returns what a head that predicts these tokens should output, [..., D].

    Args:
      params: Parameters of trunk and heads.
      hidden: [..., D], the states that predict `tokens`.
      tokens: int32 [...], tokens at the heads' target positions.
    """
    if self.cfg.options.target == "embedding":
      return self.generator.embed(params, tokens)
    return self._normalized(params, hidden)

  def logits(self, params: Params, predicted: jax.Array) -> jax.Array:
    """Returns the logits of predictions [..., D], float32 [..., V]."""
    target = self.cfg.options.target
    if target == "post":
      return self.generator.project(params, predicted)
    if target == "embedding":
      return self._log_density(params, predicted)
    return self.generator.logits(params, predicted)

  def draft(
      self, params: Params, direction: str, offset: int | None,
      hidden: jax.Array, tokens: jax.Array,
  ) -> jax.Array:
    """Returns the heads' float32 logits.

    Args:
      params: Parameters of trunk and heads.
      direction: "horizontal" or "vertical".
      offset: Offset of the head; None for all heads.
      hidden: [..., D], the states that predicted `tokens`, before the norm.
      tokens: int32 [...], generated tokens.

    Returns:
      [..., V] for one offset, [n, ..., V] for all.
    """
    logits = self.logits(
        params, self.predict(params, direction, hidden, tokens, offset)
    )
    return sharding.replicate_axis(logits if offset is None else logits[0])

  def model(self) -> Model:
    """Returns the generator's functions, with drafting."""
    horizontal, vertical = (self.cfg.count(name) for name in DIRECTIONS)
    return dataclasses.replace(
        self.generator.model(), draft=self.draft, heads=(horizontal, vertical))

  def _module(self, offsets: int) -> Any:
    return Predictors(
        offsets, self.cfg.d_model, self.generator.cfg.norm_eps)

  def _normalized(self, params: Params, hidden: jax.Array) -> jax.Array:
    if self.cfg.options.target == "post":
      return self.generator.normalize(params, hidden)
    return hidden[..., :self.cfg.d_model]  # drops the drafter's taps

  def _log_density(self, params: Params, predicted: jax.Array) -> jax.Array:
    """Returns each token's log-density under a Gaussian around a prediction.

    The variance is that of the embedding table. The paper specifies no decoding
    of predicted embeddings; this one has no parameter to tune.
    """
    tokens = jnp.arange(self.cfg.vocab)
    table = self.generator.embed(params, tokens).astype(jnp.float32)
    density = predicted.astype(jnp.float32) @ table.T
    density -= 0.5 * jnp.sum(table**2, axis=-1)
    return density / jnp.mean(jnp.var(table, axis=0))


def bind_heads(
    generator: Generator, cfg: HeadsConfig, params: Params | None = None
) -> Model:
  """Returns the generator's model with `draft` and `heads` bound.

  Args:
    generator: The trunk.
    cfg: Config of the heads.
    params: Parameters of trunk and heads, to check that they belong together.

  Raises:
    UserError: The heads belong to another trunk, grid or set of offsets.
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
    _require(got == expected, f"{what} {got}", f"{what} {expected}")
  _require(_grid_of(cfg) == _grid_of(own), _grid_of(cfg), _grid_of(own))
  if params is None:
    return
  _require(
      same_trunk(cfg.trunk, fingerprint(params["trunk"])),
      "another trunk's weights", "this trunk's weights",
  )
  heads = SpatialHeads(generator, cfg)
  wanted = jax.eval_shape(heads.init, jax.random.key(0))
  _require(
      _shapes(params["heads"]) == _shapes(wanted),
      f"weights of other offsets than {cfg.options}", "these offsets",
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
        f"Expected spatial heads for {expected}, got spatial heads for {got}. "
        "Train heads for this model with train.mtp."
    )
