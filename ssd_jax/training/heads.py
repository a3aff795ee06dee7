"""Trains spatial heads by self-distillation on generated images.

Stage one generates an image for every caption with the frozen trunk. Stage two
recomputes the trunk's hidden states on these images and fits all heads to them
in one step.

Source: SSD, arXiv:2606.20543, section 3.2, equation 3 and table 8.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import os
import pathlib

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
from ssd_jax.core.types import Params
from ssd_jax.models.fingerprint import same_trunk
from ssd_jax.models.generator import Generator
from ssd_jax.models.spatial_heads import (
  DIRECTIONS,
  HeadsConfig,
  HeadsOptions,
  SpatialHeads,
)
from ssd_jax.runtime import sharding
from ssd_jax.storage.files import read_json, write_json, write_text
from ssd_jax.training import loop, losses, self_distillation, watch as watch_lib
from ssd_jax.training.self_distillation import (
  GeneratedTokens,
  GenerationConfig,
  Teacher,
)
from ssd_jax.training.state import (
  TrainState,
  apply_gradients,
  make_optimizer,
  mean_gradients,
)
from ssd_jax.training.watch import WatchConfig

TABLE = "acceptance.md"


@dataclasses.dataclass(frozen=True)
class MTPConfig:
  """Settings of head training; the defaults are the paper's.

  Attributes:
    heads: Number and kind of the heads.
    draw: Settings of image generation.
    optimizer: Optimizer of the heads. It does not clip gradients: a common
      norm would couple the heads.
    loop: Steps, batch and logging.
    drop_caption: Share of examples shown to the unconditional stream.
    eval_images: Most held-out images on which acceptance is measured.
    watch: Decoding with the heads now and then.
  """

  heads: HeadsOptions = HeadsOptions()
  draw: GenerationConfig = GenerationConfig()
  optimizer: OptimizerConfig = OptimizerConfig(
      learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=20,
      b1=0.9, b2=0.95, weight_decay=0.01, clip=math.inf,
  )
  loop: LoopConfig = LoopConfig()
  drop_caption: float = 0.1
  eval_images: int = 64
  watch: WatchConfig = WatchConfig()

  def __post_init__(self):
    check(0 <= self.drop_caption < 1, "drop_caption", self.drop_caption,
          "in [0, 1)")
    check(self.eval_images >= 1, "eval_images", self.eval_images, ">= 1")


def run(
    teacher: Teacher, captions: Mapping[str, Sequence[str]], cfg: MTPConfig,
    workdir: str | os.PathLike, peak: float | None = None,
) -> tuple[TrainState, HeadsConfig]:
  """Trains spatial heads in `workdir`.

  Args:
    teacher: The frozen trunk.
    captions: Captions of the splits "train" and "validation".
    cfg: Settings.
    workdir: Folder of tokens, checkpoints, logs, heads.json and acceptance.md.
    peak: FLOPs per second of all devices, for the log's utilisation.

  Returns:
    (state whose params are the heads', description of the heads).

  Raises:
    UserError: if an offset leaves the grid or `workdir` holds another run.
  """
  workdir = pathlib.Path(workdir)
  _check_offsets(teacher.generator.grid, cfg.heads)
  heads_cfg = HeadsConfig.make(teacher.generator, cfg.heads, teacher.params)
  heads = SpatialHeads(teacher.generator, heads_cfg)
  model = heads.model()
  watch_lib.decoders_of(model, cfg.watch)  # refused before images are generated
  if cfg.drop_caption:  # refused before, too, without unconditional stream
    teacher.encode_prompts(captions["train"][:1], True)
  claim(workdir / "heads.json", heads_cfg)
  splits = generate_splits(teacher, captions, cfg.draw, workdir)
  optimizer = make_optimizer(cfg.optimizer, cfg.loop)
  state = sharding.create(
      lambda key: TrainState.make(heads.init(key), optimizer, cfg.optimizer),
      jax.random.key(cfg.loop.seed))
  step = make_step(heads, cfg, optimizer)
  data = self_distillation.batches(
      splits["train"], teacher, cfg.loop.batch, cfg.loop.seed,
      cfg.drop_caption,
  )
  measure = make_measure(heads, teacher)
  held_out = lambda batch: plain_batches(
      splits["validation"], teacher, batch, cfg.eval_images)

  def evaluate(state):
    figures = measure(state.eval_params, held_out(cfg.loop.batch))
    write_table(workdir / TABLE, figures)
    return {f"{d}_{k}/{i + 1}": float(x) for d, values in figures.items()
            for k, xs in values.items() for i, x in enumerate(xs)}

  watch = watch_lib.make_watch(
      model, teacher, splits["validation"], cfg.watch)
  flops = step_flops(
      teacher.generator, teacher.params["trunk"], state.params,
      next(held_out(1))["prompt"].tokens.shape[1], cfg.loop.batch)
  state = loop.train(
      str(workdir), state, functools.partial(step, teacher.params), data,
      cfg.loop, evaluate, lambda state: watch(state.eval_params),
      cfg.watch.every, peak and flops / peak)
  return state, heads_cfg


def generate_splits(
  teacher: Teacher,
  captions: Mapping[str, Sequence[str]],
  cfg: GenerationConfig,
  workdir: pathlib.Path,
) -> dict[str, GeneratedTokens]:
  """Generates the images of every split (stage one), each with its own seed."""
  programs = teacher.programs()
  return {
      name: self_distillation.generate_images(
          teacher, texts, dataclasses.replace(cfg, seed=cfg.seed + index),
          workdir / "tokens" / name, programs,
      )
      for index, (name, texts) in enumerate(sorted(captions.items()))
  }


def make_step(
    heads: SpatialHeads, cfg: MTPConfig,
    optimizer: optax.GradientTransformation,
):
  """Returns a jitted (trunk params, state, batch) -> (state, metrics).

  The function donates the state.
  """

  def total(head_params, trunk_params, batch):
    hidden = heads.generator.hidden(
        trunk_params, batch["prompt"], batch["tokens"]
    )
    by_direction = losses.head_losses(
        heads, {**trunk_params, "heads": head_params},
        jax.lax.stop_gradient(hidden), batch["tokens"],
    )
    # A sum gives each head the gradient that it would have if trained alone.
    return sum(jnp.sum(x) for x in by_direction.values()), by_direction

  @functools.partial(jax.jit, donate_argnums=1)
  def step(trunk_params, state: TrainState, batch):
    grads, by_direction = mean_gradients(
        lambda part: jax.grad(total, has_aux=True)(
            state.params, trunk_params, part),
        batch, cfg.loop.accumulate)
    state = apply_gradients(state, grads, optimizer, cfg.optimizer)
    metrics = {f"{k}_loss": jnp.mean(x) for k, x in by_direction.items()}
    return state, metrics | {"gradient": optax.global_norm(grads)}

  return step


def step_flops(
    generator: Generator, trunk: Params, heads: Params, prompt_slots: int,
    batch: int,
) -> float:
  """Returns the FLOPs of a step, counted by hand.

  The frozen trunk runs forward only, the heads forward and backward.

  Args:
    generator: The trunk.
    trunk: Its parameters, or their shapes.
    heads: Parameters of the heads, or their shapes.
    prompt_slots: Slots of a prompt.
    batch: Images of a step.
  """
  cfg, grid = generator.cfg, generator.grid
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  slots = prompt_slots + grid.length
  attention = 4 * slots**2 * cfg.n_layers * cfg.n_heads * cfg.head_dim
  each = 2 * slots * count(trunk["layers"]) + attention
  return batch * (each + 6 * grid.num_tokens * count(heads))


def make_measure(heads: SpatialHeads, teacher: Teacher):
  """Returns (head params, batches) -> {direction: {figure: float [n]}}.

  The figures are averaged over the batches.
  """

  @jax.jit
  def figures(head_params, trunk_params, prompt, tokens_SN):
    streams = prompt.tokens.shape[0] // tokens_SN.shape[0]
    params = {**trunk_params, "heads": head_params}
    hidden = heads.generator.hidden(
        params, prompt, jnp.concatenate([tokens_SN] * streams)
    )
    hidden = hidden.reshape(streams, *tokens_SN.shape, -1)
    found = losses.head_acceptance(
        heads, params, hidden, tokens_SN, teacher.sampling
    )
    loss = losses.head_losses(heads, params, hidden[0], tokens_SN)
    return {k: v | {"loss": loss[k]} for k, v in found.items()}

  def measure(head_params, held_out):
    each = [figures(head_params, teacher.params, **batch) for batch in held_out]
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *each)

  return measure


def plain_batches(
    source: GeneratedTokens, teacher: Teacher, batch: int, count: int
) -> Iterator[dict]:
  """Yields {"prompt", "tokens_SN"} of the first images, captions kept."""
  count = min(count, len(source))
  batch = min(batch, count)
  for start in range(0, count - batch + 1, batch):
    images = np.arange(start, start + batch)
    prompt = source.prompts(teacher, images, teacher.guided)
    yield {"prompt": prompt, "tokens_SN": source.sequences(images)}


def write_table(path: pathlib.Path, figures) -> None:
  """Writes a table of acceptance per direction and offset, atomically."""
  lines = ["| direction | offset | acceptance | top-1 | loss |",
           "|---|---|---|---|---|"]
  for name in (d for d in DIRECTIONS if d in figures):
    columns = (figures[name][k] for k in ("accept", "top1", "loss"))
    for offset, row in enumerate(zip(*columns, strict=True), start=1):
      values = " | ".join(f"{x:.4f}" for x in row)
      lines.append(f"| {name} | {offset} | {values} |")
  write_text(path, "\n".join(lines) + "\n")


def claim(path: pathlib.Path, cfg: HeadsConfig) -> None:
  """Records what a working directory trains, or checks it against the record.

  Raises:
    UserError: if the directory holds heads of another kind or trunk.
  """
  if not path.exists():
    write_json(path, dataclasses.asdict(cfg))
  found = from_config_dict(HeadsConfig, read_json(path))
  same = dataclasses.replace(found, trunk=cfg.trunk) == cfg
  if not same or not same_trunk(found.trunk, cfg.trunk):
    what = "another trunk" if same else "other settings"
    raise UserError(
        f"Expected the heads of this run, got {path.parent} with heads of "
        f"{what}. Use another workdir."
    )


def _check_offsets(grid, options: HeadsOptions) -> None:
  """Raises UserError if a head has no pair of grid positions to train on."""
  widest = grid.num_tokens if options.wrap else grid.cols
  check(options.horizontal < widest, "heads.horizontal", options.horizontal,
        f"below {widest} on a grid of {grid.rows}x{grid.cols}")
  check(options.vertical < grid.rows, "heads.vertical", options.vertical,
        f"below {grid.rows} on a grid of {grid.rows}x{grid.cols}")
