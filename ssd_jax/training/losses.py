"""Losses and acceptance of spatial heads against the frozen trunk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Params
from ssd_jax.decoding import sampling as sampling_lib
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.models.spatial_heads import DIRECTIONS, SpatialHeads


def smooth_l1(predicted: jax.Array, goal: jax.Array) -> jax.Array:
  """Returns the Huber loss, beta 1, averaged over the last axis, float32."""
  error = predicted.astype(jnp.float32) - goal.astype(jnp.float32)
  return jnp.mean(optax.losses.huber_loss(error, delta=1.0), axis=-1)


def pairs(
    grid: Grid, direction: str, count: int, wrap: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the grid position that each position predicts.

  The M positions are in raster order. End-of-row slots are no grid positions,
  hence neither sources nor targets.

  Args:
    grid: Grid of the tokens.
    direction: "horizontal" or "vertical".
    count: Number of offsets n.
    wrap: Whether horizontal pairs continue in the next row.

  Returns:
    (target of each offset and source, int32 [n, M]; whether it exists, bool
    [n, M]).
  """
  offsets = np.arange(1, count + 1)[:, None]
  positions = np.arange(grid.num_tokens)
  step = offsets if direction == "horizontal" else offsets * grid.cols
  exists = positions + step < grid.num_tokens
  if direction == "horizontal" and not wrap:
    exists &= positions % grid.cols + offsets < grid.cols
  return np.where(exists, positions + step, 0).astype(np.int32), exists


def mean_where(values: jax.Array, valid_nM: np.ndarray) -> jax.Array:
  """Returns the mean of the valid entries per offset, [n].

  Args:
    values: [n, ..., M].
    valid_nM: bool [n, M].
  """
  weight = valid_nM / np.maximum(valid_nM.sum(-1, keepdims=True), 1)
  weighted = jnp.einsum("n...m,nm->n...", values, weight)
  return jnp.mean(weighted.reshape(len(valid_nM), -1), axis=-1)


def _aim(x: jax.Array, target_nM: np.ndarray) -> jax.Array:
  """Returns the entries of x, [S, M, ...], at the targets, [n, S, M, ...]."""
  return jnp.moveaxis(x[:, target_nM], 1, 0)


def head_losses(
    heads: SpatialHeads, params: Params, hidden_SND: jax.Array,
    tokens_SN: jax.Array,
) -> dict[str, jax.Array]:
  """Returns each head's mean loss, {direction: float32 [n]}.

  Args:
    heads: The heads.
    params: Parameters of the frozen trunk and the heads.
    hidden_SND: [S, N, D], states that predict each slot.
    tokens_SN: [S, N], token of each slot.

  Source: SSD, arXiv:2606.20543, equation 3.
  """
  choice = heads.cfg.options
  slots = heads.generator.grid.slot_of.ravel()
  hidden_SMD, tokens_SM = hidden_SND[:, slots], tokens_SN[:, slots]
  goal_SMD = heads.goal(params, hidden_SMD, tokens_SM)
  losses = {}
  for name in params["heads"]:
    target_nM, valid_nM = pairs(
        heads.generator.grid, name, heads.cfg.count(name), choice.wrap
    )
    predicted = heads.predict(params, name, hidden_SMD, tokens_SM)
    if choice.target == "token":
      loss_nSM = optax.softmax_cross_entropy_with_integer_labels(
          heads.logits(params, predicted), _aim(tokens_SM, target_nM)
      )
    elif choice.target == "distribution":
      p_SMV = jax.nn.softmax(heads.generator.logits(params, hidden_SMD))
      loss_nSM = optax.softmax_cross_entropy(
          heads.logits(params, predicted), _aim(p_SMV, target_nM)
      )
    else:
      loss_nSM = smooth_l1(predicted, _aim(goal_SMD, target_nM))
    losses[name] = mean_where(loss_nSM, valid_nM)
  return losses


def head_acceptance(
    heads: SpatialHeads, params: Params, hidden_GSND: jax.Array,
    tokens_SN: jax.Array, sampling: Sampling,
) -> dict[str, dict[str, jax.Array]]:
  """Returns each head's acceptance, {direction: {figure: float32 [n]}}.

  "accept" is the mean of sum_v min(p, q), the probability that a draft sampled
  from the head's q is accepted against the trunk's p. "top1" is the mean of p
  at the likeliest token of q, the probability that the trunk samples it.

  Args:
    heads: The heads.
    params: Parameters of the trunk and the heads.
    hidden_GSND: [G, S, N, D], states that predict each slot, per guidance
      stream.
    tokens_SN: [S, N], token of each slot.
    sampling: Settings of p and q.
  """
  slots = heads.generator.grid.slot_of.ravel()
  hidden, tokens_SM = hidden_GSND[:, :, slots], tokens_SN[:, slots]
  tokens = jnp.broadcast_to(tokens_SM, hidden.shape[:-1])
  p_SMV = sampling_lib.target(heads.generator.logits(params, hidden), sampling)
  figures = {}
  for name in (d for d in DIRECTIONS if heads.cfg.count(d)):
    target_nM, valid_nM = pairs(
        heads.generator.grid, name, heads.cfg.count(name),
        heads.cfg.options.wrap,
    )

    def passes(offset_inputs, p_SMV=p_SMV):
      predicted_GSMD, target_M = offset_inputs
      logits = heads.logits(params, predicted_GSMD)
      q_SMV = sampling_lib.target(logits, sampling)
      goal_SMV = p_SMV[:, target_M]
      best_SM = jnp.argmax(q_SMV, axis=-1)
      return {
          "accept": jnp.sum(jnp.minimum(goal_SMV, q_SMV), axis=-1),
          "top1": jnp.take_along_axis(goal_SMV, best_SM[..., None], -1)[..., 0],
      }

    predicted = heads.predict(params, name, hidden, tokens)
    # One offset at a time, because distributions are the largest arrays here.
    by_offset = jax.lax.map(passes, (predicted, jnp.asarray(target_nM)))
    figures[name] = {k: mean_where(v, valid_nM) for k, v in by_offset.items()}
  return figures
