"""The state of a training run and its update."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from ssd_jax.core.config import LoopConfig, OptimizerConfig
from ssd_jax.core.weights import path_of, weight_of
from ssd_jax.runtime import sharding

Params = Any


class TrainState(flax.struct.PyTreeNode):
  """The state of a run; checkpoints hold it and the data stream's position.

  Attributes:
    step: int32 [], optimizer steps so far.
    params: Trained parameters.
    opt_state: State of the optimizer.
    ema: Moving average of the parameters, or None.
    extra: Anything else that a step updates, such as codebook statistics.
  """

  step: jax.Array
  params: Params
  opt_state: Any
  ema: Params | None
  extra: Any = None

  @classmethod
  def make(
      cls, params: Params, optimizer: optax.GradientTransformation,
      cfg: OptimizerConfig, extra: Any = None,
  ) -> "TrainState":
    """Returns the state before the first step."""
    ema = jax.tree.map(jnp.copy, params) if cfg.ema else None
    return cls(jnp.int32(0), params, optimizer.init(params), ema, extra)

  @property
  def eval_params(self) -> Params:
    """The parameters to evaluate and export."""
    return self.params if self.ema is None else self.ema


def make_optimizer(
    cfg: OptimizerConfig, loop: LoopConfig
) -> optax.GradientTransformation:
  """Returns the configured optimizer with clipping.

  Weight decay applies to matrices only.
  """
  schedule = optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=cfg.learning_rate,
      warmup_steps=cfg.warmup_steps,
      decay_steps=max(loop.steps, cfg.warmup_steps + 1),
      end_value=cfg.final_learning_rate,
  )
  if cfg.kind == "muon":
    update = optax.contrib.muon(
        schedule, beta=cfg.b2, weight_decay=cfg.weight_decay,
        adam_b1=cfg.b1, adam_b2=cfg.b2,
        muon_weight_dimension_numbers=_layer_matrices, consistent_rms=0.2,
    )
  else:
    is_matrix = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    update = optax.adamw(
        schedule, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=is_matrix
    )
  return optax.chain(optax.clip_by_global_norm(cfg.clip), update)


def _layer_matrices(params: Params) -> Any:
  """Returns the matrix axes of a trunk's stacked leaves; AdamW's have None."""
  def numbers(path, leaf):
    weight = weight_of(path_of(path), leaf.ndim)
    if weight is None or not weight.tiled or leaf.ndim == len(weight.axes):
      return None
    first = leaf.ndim - len(weight.axes)
    split = first + weight.contracted
    return optax.contrib.MuonDimensionNumbers(
        tuple(range(first, split)), tuple(range(split, leaf.ndim)))

  return jax.tree_util.tree_map_with_path(numbers, params)


def apply_gradients(
    state: TrainState, grads: Params,
    optimizer: optax.GradientTransformation, cfg: OptimizerConfig,
) -> TrainState:
  """Returns the state after one optimizer step."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  step = state.step + 1
  ema = state.ema
  if cfg.ema:
    # The usual ramp, so that early averages forget the initialisation quickly.
    decay = jnp.minimum(cfg.ema, (1.0 + step) / (10.0 + step))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
  state = state.replace(
      step=step, params=params, opt_state=opt_state, ema=ema)
  return sharding.constrain(state)


def mean_gradients(
    gradients: Callable[[Any], Any], batch: Any, parts: int
) -> Any:
  """Returns the mean of `gradients` over parts of the batch.

  Only one part is in memory at a time.

  Args:
    gradients: Returns gradients, and figures that are means too, of a batch.
    batch: Arrays whose first axis holds rows, or the rows of several streams.
    parts: Number of parts, run one after the other.
  """
  if parts == 1:
    return gradients(batch)
  rows = min(x.shape[0] for x in jax.tree.leaves(batch))

  def cut(x):
    # A part takes every parts-th row, so that rows stay on their devices.
    x = x.reshape(-1, rows // parts, parts, *x.shape[1:])
    return jnp.moveaxis(x, 2, 0).reshape(parts, -1, *x.shape[3:])

  def add(total, part):
    return jax.tree.map(jnp.add, total, gradients(part)), None

  cuts = jax.tree.map(cut, batch)
  first = gradients(jax.tree.map(lambda x: x[0], cuts))
  total, _ = jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], cuts))
  return jax.tree.map(lambda x: x / parts, total)


@jax.jit
def checksum_tree(leaves: Sequence[jax.Array]) -> list[jax.Array]:
  """Returns a checksum of each array, uint32 [], which any changed bit changes.

  The checksum is the sum modulo 2^32 of the array's words, each multiplied by
  an odd number of its index. The sum is exact in any order, hence equal on any
  mesh.
  """
  return [_checksum_leaf(x) for x in leaves]


def _checksum_leaf(x: jax.Array) -> jax.Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    at = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    index = index * jnp.uint32(size) + at
  return jnp.sum(
      words.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)
