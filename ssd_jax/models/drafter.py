"""The EAGLE-style drafter: one decoder layer that continues hidden states.

Given the hidden state that predicted a slot and the slot's token, it predicts
the slot's own hidden state, which the trunk's frozen head turns into a draft of
the next slot. Trunk and drafter share embedding, head, width and rotary scheme.

With taps it is EAGLE-3's drafter (Li et al. 2025, arXiv:2503.01840): a
projection of the outputs of several trunk layers replaces the hidden state; the
drafter's own predictions are used as they are.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError, check_sizes
from ssd_jax.core.types import Drafter, KVCache, Model, Params, Queries
from ssd_jax.models.fingerprint import (
  check_fingerprint,
  fingerprint,
  same_trunk,
)
from ssd_jax.models.generator import Generator
from ssd_jax.models.transformer import Layer, TrunkConfig
from ssd_jax.runtime import sharding


class DrafterLayer(nn.Module):
  """Token and state -> fused projection -> one layer -> next state.

  Attributes:
    cfg: Config of the trunk; the drafter is one more such layer.
  """

  cfg: TrunkConfig

  @nn.compact
  def __call__(
      self, embedded_SQD, hidden_SQD, cos_sin_SQh2, visible_SQX,
      cache=None, slots_SQ=None,
  ):
    """Returns (hidden [S, Q, D] before the final norm, cache).

    The layer has no norm before attention.

    Source: Li et al. 2024, EAGLE, arXiv:2401.15077, section 4.1.
    """
    x = jnp.concatenate([embedded_SQD, hidden_SQD.astype(embedded_SQD.dtype)],
                        axis=-1)
    fuse = nn.Dense(self.cfg.d_model, dtype=x.dtype, name="fuse")
    x = sharding.replicate_axis(fuse(sharding.replicate_axis(x)))
    (x, cache), _ = Layer(self.cfg, input_norm=False, name="layer")(
        (x, cache), 0, cos_sin_SQh2, visible_SQX, slots_SQ
    )
    return x, cache


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
  """The trunk that a drafter belongs to; stored beside its weights.

  Attributes:
    d_model: Width D of the trunk.
    vocab: Number of image tokens V.
    rows: Rows of the grid.
    cols: Columns of the grid.
    end_of_row: Whether the grid has end-of-row tokens.
    trunk: Fingerprint of the trunk; empty for any trunk.
    taps: Layers of the trunk that the drafter reads; empty if it reads only the
      last hidden state.
  """

  d_model: int
  vocab: int
  rows: int
  cols: int
  end_of_row: bool
  trunk: tuple[float, ...] = ()
  taps: tuple[int, ...] = ()

  def __post_init__(self):
    check_sizes(self)
    check_fingerprint(self.trunk)

  @classmethod
  def make(
      cls, generator: Generator, params: Params | None = None
  ) -> "DrafterConfig":
    """Returns the config of a generator's drafter.

    Args:
      generator: The trunk.
      params: Parameters of the trunk, which the drafter is then tied to.
    """
    grid = generator.grid
    trunk = () if params is None else fingerprint(params["trunk"])
    return cls(generator.cfg.d_model, generator.cfg.vocab_out, grid.rows,
               grid.cols, grid.end_of_row, trunk, generator.taps)

  def is_same(self, other: "DrafterConfig") -> bool:
    """Returns whether both belong to the same trunk, up to rounding."""
    alike = dataclasses.replace(self, trunk=other.trunk) == other
    return alike and same_trunk(self.trunk, other.trunk)


@dataclasses.dataclass(frozen=True, eq=False)
class DraftNet:
  """A drafter bound to the trunk whose hidden states it continues.

  Its positions are those of the image slots, the last N rows of the trunk's
  rotary table: rotations are relative, so this holds for prompts of any length.

  Attributes:
    generator: Trunk, grid and positions; its taps are the layers read.
  """

  generator: Generator

  @functools.cached_property
  def layer(self) -> DrafterLayer:
    """The module whose parameters the functions take."""
    return DrafterLayer(self.generator.cfg)

  def init(self, key: jax.Array) -> Params:
    """Returns random float32 parameters, for params["drafter"]."""
    cfg = self.generator.cfg
    x = jnp.zeros((1, 1, cfg.d_model))
    cos_sin = jnp.zeros((1, 1, cfg.head_dim // 2, 2))
    keys, init = jax.random.split(key), jax.jit(self.layer.init)
    params = init(keys[0], x, x, cos_sin, jnp.ones((1, 1, 1), bool))["params"]
    if self.generator.taps:
      shape = (len(self.generator.taps) * cfg.d_model, cfg.d_model)
      params["narrow"] = nn.initializers.lecun_normal()(keys[1], shape)
    return params

  def cache(self, streams: int, scratch: int) -> KVCache:
    """Returns one image's empty cache, [1, G, K, N + scratch, H]."""
    cfg = self.generator.cfg
    shape = (1, streams, cfg.n_kv_heads, self.generator.grid.length + scratch,
             cfg.head_dim)
    zeros = jnp.zeros(shape, self.generator.dtype)
    return KVCache(zeros, zeros)

  def forward(
      self, params: Params, cache: KVCache, hidden_GQD: jax.Array,
      queries: Queries,
  ) -> tuple[jax.Array, KVCache]:
    """Predicts the hidden states of queries.

    Args:
      params: Parameters of the model.
      cache: A cache made by `cache`.
      hidden_GQD: The state that predicted each query's token.
      queries: Queries of one image; `slots` index the drafter's cache.

    Returns:
      The predicted hidden states of the queries' slots [G, Q, D], and the
      updated cache.
    """
    return self._apply(
        params, queries.tokens, hidden_GQD, queries.positions,
        queries.visible, cache, queries.slots,
    )

  def unroll(
      self, params: Params, hidden_SND: jax.Array, tokens_SN: jax.Array,
      steps: int,
  ) -> list[jax.Array]:
    """Predicts the hidden state of every slot, with several numbers of steps.

    Step 0 starts from the true state before the slot, step t from the drafter's
    own predictions of the last t slots, as on a path of a tree whose tokens are
    correct. Predictions of step t are meaningful from slot t on.

    Args:
      params: Parameters of the model.
      hidden_SND: The states that predict each slot (`Generator.hidden`).
      tokens_SN: int32, the tokens of the slots.
      steps: Number of steps.

    Returns:
      Predictions [S, N, D] for each step.
    """
    length = tokens_SN.shape[1]
    slots = jnp.arange(length)
    inputs, predicted = [self._narrow(params, hidden_SND)], []
    for step in range(steps):
      rows = [
          jnp.concatenate([_sees(slots, t, u) for u in range(step + 1)], -1)
          for t in range(step + 1)
      ]
      hidden, _ = self._apply(
          params, jnp.tile(tokens_SN, (1, step + 1)),
          jnp.concatenate(inputs, axis=1), jnp.tile(slots, step + 1),
          jnp.concatenate(rows),
      )
      predicted.append(hidden[:, -length:])
      inputs.append(jnp.roll(predicted[-1], 1, axis=1))
    return predicted

  def _narrow(self, params: Params, hidden: jax.Array) -> jax.Array:
    """Projects tapped layers to one state [..., D]; keeps predictions."""
    width = self.generator.cfg.d_model
    if hidden.shape[-1] == width:
      return hidden
    return hidden[..., width:] @ params["drafter"]["narrow"].astype(
        hidden.dtype)

  def _apply(
      self, params, tokens, hidden_SQD, positions_Q, visible_QX, cache=None,
      slots_Q=None,
  ):
    rows = hidden_SQD.shape[0]
    rope = self.generator.rope[-self.generator.grid.length:]
    over_rows = functools.partial(_over_rows, rows)
    embedded = self.generator.embed(params, tokens)
    return self.layer.apply(
        {"params": params["drafter"]},
        embedded if tokens.ndim > 1 else over_rows(embedded),
        self._narrow(params, hidden_SQD),
        over_rows(jnp.asarray(rope)[positions_Q]), over_rows(visible_QX),
        cache, None if slots_Q is None else over_rows(slots_Q),
    )


def bind_drafter(
    generator: Generator, model: Model, cfg: DrafterConfig | None = None,
    params: Params | None = None,
) -> Model:
  """Returns the model with a drafter bound.

  Args:
    generator: The trunk.
    model: Its functions, with or without spatial heads.
    cfg: Config of the drafter, to check that it fits the trunk.
    params: Parameters of trunk and drafter, to check that they belong together.

  Raises:
    UserError: The drafter belongs to another trunk.
  """
  tapped = generator
  if cfg is not None and cfg.taps:
    tapped = dataclasses.replace(generator, taps=cfg.taps)
    model = dataclasses.replace(
        model, prefill=tapped.prefill, forward=tapped.forward)
  if any(not 0 <= layer < generator.cfg.n_layers for layer in tapped.taps):
    _refuse(f"a trunk with more layers than {generator.cfg.n_layers}")
  net, own = DraftNet(tapped), DrafterConfig.make(tapped, params)
  if cfg is not None and not cfg.is_same(own):
    what = "another trunk's weights"
    for name in ("d_model", "vocab", "rows", "cols", "end_of_row"):
      if getattr(cfg, name) != getattr(own, name):
        what = f"{name}={getattr(cfg, name)} instead of {getattr(own, name)}"
    _refuse(what)
  if params is not None:
    wanted = jax.eval_shape(net.init, jax.random.key(0))
    if _shapes(params["drafter"]) != _shapes(wanted):
      _refuse("layers of another shape")
  return dataclasses.replace(model, drafter=_functions(tapped))


def _functions(generator: Generator) -> Drafter:
  """Returns the functions of the drafter of a grid, and of its preview's.

  The rows of the rotary table before those of the grid are the preview's.
  """
  net, small = DraftNet(generator), None
  if generator.preview is not None:
    small = _functions(dataclasses.replace(
        generator, grid=generator.preview, preview=None,
        rope=generator.rope[:-generator.grid.length]))
  return Drafter(net.cache, net.forward, generator.cfg.d_model, small)


def _refuse(what: str) -> None:
  raise UserError(
      f"Expected a drafter for this trunk, got a drafter for {what}. Train one "
      "with train.drafter."
  )


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
  return {
      jax.tree_util.keystr(path): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _over_rows(rows: int, x: jax.Array) -> jax.Array:
  return jnp.broadcast_to(x, (rows, *x.shape))


def _sees(slots_N: jax.Array, step: int, other: int) -> jax.Array:
  """Returns whether a slot at `step` sees a slot at step `other`, bool [N, N].

  A path of t steps sees true states up to its start, t slots back, and then one
  slot per step.
  """
  back = slots_N[:, None] - slots_N
  if other == 0:
    return back >= step
  return (back == step - other) & (step >= other)
