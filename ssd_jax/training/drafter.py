"""Trains an EAGLE-style drafter by self-distillation on generated images.

Stage one generates an image for every caption with the frozen trunk. Stage two
recomputes the hidden states of both streams on these images and fits the
drafter with two losses: smooth L1 on the states, and the soft cross-entropy
against the guided distribution that verifies its drafts.

Options beyond EAGLE: `unroll` trains on the drafter's own predictions, as deep
tree paths need (EAGLE-3's training-time test); with `taps` and `state_weight`
0, the result is EAGLE-3. `redundancy` is CASCADE's redundancy-aware target.
Its formula was not available; this is our reading:

  Two slots of an image whose target hidden states have a cosine of `likeness`
  or more are interchangeable: the tokens that the target expects at one are
  good drafts at the other. The target of the cross-entropy becomes
  (1 - redundancy) p + redundancy r, where r is the mean of p over all slots
  interchangeable with this one, itself included. This is label smoothing
  (Szegedy et al. 2016) whose smoothing mass follows the target's states; a slot
  without interchangeable slots keeps p.

Source: Li et al. 2024, arXiv:2401.15077, section 4.2; 2025, arXiv:2503.01840.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
import os
import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssd_jax.core.config import (
  LoopConfig,
  OptimizerConfig,
  UserError,
  check,
  from_config_dict,
)
from ssd_jax.data import stream as data_stream
from ssd_jax.decoding import sampling as sampling_lib
from ssd_jax.models.drafter import DrafterConfig, DraftNet
from ssd_jax.runtime import sharding
from ssd_jax.storage.files import read_json, write_json
from ssd_jax.training import loop, losses
from ssd_jax.training.draft_paths import WIDTH, Acceptance
from ssd_jax.training.heads import plain_batches
from ssd_jax.training.self_distillation import GeneratedTokens, Teacher
from ssd_jax.training.state import (
  TrainState,
  apply_gradients,
  make_optimizer,
  mean_gradients,
)

TABLE = "acceptance.md"
_AIMS = ("state_weight", "token_weight", "noise", "unroll", "redundancy",
         "likeness")


@dataclasses.dataclass(frozen=True)
class DrafterTraining:
  """Settings of drafter training; the defaults are EAGLE's and LANTERN's.

  Attributes:
    optimizer: Optimizer of the drafter; clips gradients by their norm.
    loop: Steps, batch and logging.
    taps: Layers of the trunk that the drafter reads (EAGLE-3); empty reads the
      trunk's last state alone.
    state_weight: Weight of the smooth L1 loss; 0 in EAGLE-3.
    token_weight: Weight of the cross-entropy.
    noise: Width of the uniform noise on input states, relative to their root
      mean square.
    unroll: Steps on the drafter's own predictions; 1 in EAGLE.
    redundancy: Weight of the redundancy-aware part of the target; 0 in EAGLE.
    likeness: Smallest cosine of interchangeable slots.
    eval_images: Most held-out images on which acceptance is measured.
    depth: Levels of the tree that is built from the acceptance.
  """

  optimizer: OptimizerConfig = OptimizerConfig(
      learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=100,
      b1=0.9, b2=0.95, weight_decay=0.0, clip=0.5,
  )
  loop: LoopConfig = LoopConfig()
  taps: tuple[int, ...] = ()
  state_weight: float = 1.0
  token_weight: float = 0.1
  noise: float = 0.2
  unroll: int = 1
  redundancy: float = 0.0
  likeness: float = 0.95
  eval_images: int = 64
  depth: int = 5

  def __post_init__(self):
    for name in ("state_weight", "token_weight", "noise"):
      check(0 <= getattr(self, name) < math.inf, name, getattr(self, name),
            "a number >= 0")
    check(self.state_weight + self.token_weight > 0, "token_weight",
          self.token_weight, "more than 0, or state_weight to be")
    check(-1 <= self.likeness <= 1, "likeness", self.likeness, "in [-1, 1]")
    check(len(set(self.taps)) == len(self.taps), "taps", self.taps,
          "distinct layers")
    check(0 <= self.redundancy <= 1, "redundancy", self.redundancy,
          "in [0, 1]")
    for name in ("unroll", "eval_images", "depth"):
      check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")


def run(
    teacher: Teacher, splits: Mapping[str, GeneratedTokens],
    cfg: DrafterTraining, workdir: str | os.PathLike,
) -> tuple[TrainState, DrafterConfig]:
  """Trains a drafter in `workdir`.

  Args:
    teacher: The frozen trunk.
    splits: The trunk's images, "train" and "validation".
    cfg: Settings.
    workdir: Folder of checkpoints, logs, drafter.json and acceptance.md.

  Returns:
    (state whose params are the drafter's, description of the drafter).

  Raises:
    UserError: if the grid is too short or `workdir` holds another run.
  """
  workdir = pathlib.Path(workdir)
  longest = teacher.generator.grid.length - 1
  for name in ("unroll", "depth"):
    check(getattr(cfg, name) <= longest, name, getattr(cfg, name),
          f"at most {longest} on this grid")
  layers = teacher.generator.cfg.n_layers
  check(all(0 <= layer < layers for layer in cfg.taps), "taps", cfg.taps,
        f"layers in [0, {layers})")
  generator = dataclasses.replace(teacher.generator, taps=cfg.taps)
  drafter_cfg = DrafterConfig.make(generator, teacher.params)
  _claim(workdir, drafter_cfg, cfg)
  net = DraftNet(generator)
  optimizer = make_optimizer(cfg.optimizer, cfg.loop)
  state = sharding.create(
      lambda key: TrainState.make(net.init(key), optimizer, cfg.optimizer),
      jax.random.key(cfg.loop.seed))
  step = make_step(net, teacher, cfg, optimizer)
  find_ranks = make_ranks(net, teacher, cfg.depth)

  def evaluate(state):
    found = Acceptance.of(find_ranks(state.eval_params, plain_batches(
        splits["validation"], teacher, cfg.loop.batch, cfg.eval_images)),
        teacher.generator.cfg.vocab_out)
    found.write(workdir / TABLE)
    return {"first_rank": found.rates_DK[0, 0],
            "any_rank": found.rates_DK[0].sum(),
            "accepted_length": found.length(found.tree)}

  state = loop.train(
      str(workdir), state, functools.partial(step, teacher.params),
      both_streams(splits["train"], teacher, cfg.loop), cfg.loop, evaluate,
  )
  return state, drafter_cfg


def both_streams(
    source: GeneratedTokens, teacher: Teacher, cfg: LoopConfig
) -> grain.IterDataset:
  """Returns endless {"prompt": Prompt [G * B], "tokens": int32 [B, N]}."""

  def assemble(images):
    prompt = source.prompts(teacher, images, teacher.guided)
    return {"prompt": prompt, "tokens": source.sequences(images)}

  load = lambda source, index, rng: np.int64(index)
  return data_stream.stream(source, load, cfg.batch, cfg.seed).map(assemble)


def make_step(
    net: DraftNet, teacher: Teacher, cfg: DrafterTraining,
    optimizer: optax.GradientTransformation,
):
  """Returns a jitted (trunk params, state, batch) -> (state, metrics).

  The function donates the state.
  """

  def total(drafter_params, trunk_params, batch, key):
    params = {**trunk_params, "drafter": drafter_params}
    hidden_GBND = jax.lax.stop_gradient(
        stream_states(net, params, batch["prompt"], batch["tokens"]))
    of_state, of_token = drafter_losses(
        net, params, hidden_GBND, batch["tokens"], teacher.sampling.guidance,
        cfg, key)
    loss = cfg.state_weight * of_state + cfg.token_weight * of_token
    return loss, (of_state, of_token)

  @functools.partial(jax.jit, donate_argnums=1)
  def step(trunk_params, state: TrainState, batch):
    key = jax.random.fold_in(jax.random.key(cfg.loop.seed), state.step)
    grads, (of_state, of_token) = mean_gradients(
        lambda part: jax.grad(total, has_aux=True)(
            state.params, trunk_params, part, key),
        batch, cfg.loop.accumulate)
    state = apply_gradients(state, grads, optimizer, cfg.optimizer)
    return state, {"state_loss": of_state, "token_loss": of_token,
                   "gradient": optax.global_norm(grads)}

  return step


def stream_states(
    net: DraftNet, params, prompt, tokens_BN: jax.Array
) -> jax.Array:
  """Returns the states that predict each slot, per stream, [G, B, N, D].

  The layers that the drafter taps follow the first D entries.
  """
  streams = len(prompt.tokens) // len(tokens_BN)
  tokens_SN = jnp.tile(tokens_BN, (streams, 1))
  hidden = net.generator.hidden(params, prompt, tokens_SN)
  return hidden.reshape(streams, *tokens_BN.shape, -1)


def predicted_states(
    net: DraftNet, params, hidden_GBND: jax.Array, tokens_BN: jax.Array,
    steps: int,
) -> list[jax.Array]:
  """Returns the predicted states of each step t, [G, B, N - 1 - t, D].

  Step t predicts the states of slots t to N - 2; their logits are drafts for
  slots t + 1 to N - 1.
  """
  shape = (*hidden_GBND.shape[:-1], net.generator.cfg.d_model)
  tokens_SN = jnp.tile(tokens_BN, (shape[0], 1))
  hidden_SND = hidden_GBND.reshape(-1, *hidden_GBND.shape[2:])
  unrolled = net.unroll(params, hidden_SND, tokens_SN, steps)
  return [x.reshape(shape)[:, :, t:-1] for t, x in enumerate(unrolled)]


def drafter_losses(
    net: DraftNet, params, hidden_GBND: jax.Array, tokens_BN: jax.Array,
    guidance: jax.Array, cfg: DrafterTraining, key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the losses of a batch.

  Args:
    net: The drafter.
    params: Parameters of the frozen trunk and the drafter.
    hidden_GBND: [G, B, N, D], states that predict each slot.
    tokens_BN: [B, N], token of each slot.
    guidance: Guidance scale, which combines the streams' logits.
    cfg: Weights and options.
    key: Random key of the noise.

  Returns:
    (smooth L1 of states, soft cross-entropy of tokens), float32 [], means over
    the steps.
  """
  scale = jnp.sqrt(jnp.mean(hidden_GBND.astype(jnp.float32) ** 2))
  noise = jax.random.uniform(key, hidden_GBND.shape, minval=-0.5, maxval=0.5)
  noisy = hidden_GBND + (cfg.noise * scale * noise).astype(hidden_GBND.dtype)
  goal = hidden_GBND[:, :, 1:, :net.generator.cfg.d_model]
  guided = lambda states: jax.nn.log_softmax(
      sampling_lib.guide(net.generator.logits(params, states), guidance))
  p_BMV = soften(jnp.exp(guided(goal)), goal[0], cfg)
  is_free = jnp.asarray(~net.generator.grid.is_forced[1:], jnp.float32)
  of_state = of_token = jnp.zeros(())
  predicted = predicted_states(net, params, noisy, tokens_BN, cfg.unroll)
  for step, states in enumerate(predicted):
    of_state += jnp.mean(losses.smooth_l1(states, goal[:, :, step:]))
    entropy_BM = -jnp.sum(p_BMV[:, step:] * guided(states), axis=-1)
    of_token += jnp.average(
        jnp.mean(entropy_BM, axis=0), weights=is_free[step:])
  return of_state / cfg.unroll, of_token / cfg.unroll


def soften(
    p_BMV: jax.Array, hidden_BMD: jax.Array, cfg: DrafterTraining
) -> jax.Array:
  """Returns the target with its redundancy-aware part, float32 [B, M, V].

  Args:
    p_BMV: [B, M, V], the trunk's distributions at M slots.
    hidden_BMD: [B, M, D], the states behind the distributions.
    cfg: Weight and threshold.
  """
  if not cfg.redundancy:
    return p_BMV
  x = hidden_BMD.astype(jnp.float32)
  x /= jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
  alike_BMM = jnp.einsum("bmd,bnd->bmn", x, x) >= cfg.likeness
  alike_BMM = (alike_BMM | jnp.eye(x.shape[1], dtype=bool)).astype(jnp.float32)
  alike_BMM /= jnp.sum(alike_BMM, axis=-1, keepdims=True)
  mean_BMV = jnp.einsum("bmn,bnv->bmv", alike_BMM, p_BMV)
  return (1.0 - cfg.redundancy) * p_BMV + cfg.redundancy * mean_BMV


def make_ranks(net: DraftNet, teacher: Teacher, depth: int):
  """Returns a function (drafter params, batches) -> ranks of AR's tokens.

  The ranks, int [images, N - 1, depth], are the input of `Acceptance.of`.
  """
  is_forced_N = jnp.asarray(teacher.generator.grid.is_forced)

  @jax.jit
  def find(drafter_params, trunk_params, prompt, tokens_SN):
    params = {**trunk_params, "drafter": drafter_params}
    hidden = stream_states(net, params, prompt, tokens_SN)
    ranks = []
    for step, states in enumerate(
        predicted_states(net, params, hidden, tokens_SN, depth)):
      q = sampling_lib.target(
          net.generator.logits(params, states), teacher.sampling)
      own = jnp.take_along_axis(q, tokens_SN[:, step + 1:, None], axis=-1)
      rank = jnp.sum(q > own, axis=-1)
      rank = jnp.where(is_forced_N[step + 1:], 0, rank)
      ranks.append(jnp.pad(
          rank, ((0, 0), (0, step)), constant_values=WIDTH))
    return jnp.stack(ranks, axis=-1)

  def find_all(drafter_params, held_out) -> np.ndarray:
    return np.concatenate([
        find(drafter_params, teacher.params, **batch) for batch in held_out])

  return find_all


def _claim(
    workdir: pathlib.Path, drafter_cfg: DrafterConfig, cfg: DrafterTraining
) -> None:
  """Records what `workdir` trains, or checks it against the record.

  Raises:
    UserError: if `workdir` holds a drafter of another trunk, taps or loss.
  """
  path, goal = workdir / "drafter.json", workdir / "goal.json"
  aims = {name: getattr(cfg, name) for name in _AIMS}
  if not path.exists():
    write_json(goal, aims)
    write_json(path, dataclasses.asdict(drafter_cfg))
  found = from_config_dict(DrafterConfig, read_json(path))
  if found.is_same(drafter_cfg) and read_json(goal) == aims:
    return
  raise UserError(
      f"Expected the drafter of this run, got {workdir} with a drafter of "
      "another trunk, other taps or another loss. Use another workdir."
  )
