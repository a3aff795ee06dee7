"""The loop that every training command shares: steps, logs, checkpoints.

A checkpoint holds the train state and the position of the data stream, is
written asynchronously and becomes visible by one rename, so a run killed at any
moment continues from the last whole one as if nothing had happened.
"""

from collections.abc import Callable, Mapping
import math
import pathlib
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
import tensorboardX
import tqdm

from ssd_jax.config import LoopConfig, UserError
from ssd_jax.training.state import TrainState

Metrics = Mapping[str, jax.Array]
StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def train(
    workdir: str,
    state: TrainState,
    step_fn: StepFn,
    data: grain.IterDataset,
    cfg: LoopConfig,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
) -> TrainState:
  """The state after `cfg.steps` steps, continuing from what `workdir` holds.

  Args:
    workdir: Folder of the checkpoints and TensorBoard files.
    state: The state before the first step; gives shapes when resuming.
    step_fn: Jitted; takes the state (donated) and a batch.
    data: The infinite stream of batches.
    cfg: Numbers of steps.
    evaluate: Returns figures to log, called every `cfg.eval_every` steps.

  Raises:
    UserError: when a loss is not finite; says which checkpoint is good.
  """
  folder = pathlib.Path(workdir).absolute()
  iterator = iter(data)
  with _manager(folder, cfg) as manager:
    state = _restore(manager, state, iterator)
    start = int(state.step)
    writer = tensorboardX.SummaryWriter(str(folder / "logs"), purge_step=start)
    bar = tqdm.tqdm(
        range(start, cfg.steps), initial=start, total=cfg.steps,
        desc=folder.name, mininterval=1.0,
    )
    for step in bar:
      state, metrics = step_fn(state, next(iterator))
      done = step + 1
      if done % cfg.log_every == 0 or done == cfg.steps:
        values = {k: float(v) for k, v in metrics.items()}
        _check_finite(values, done, manager)
        bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
        _write(writer, values, done)
      if done % cfg.save_every == 0 or done == cfg.steps:
        _save(manager, done, state, iterator)
      if evaluate and (done % cfg.eval_every == 0 or done == cfg.steps):
        values = evaluate(state)
        _write(writer, values, done)
        bar.write(f"step {done}: " + ", ".join(
            f"{k} {v:.4g}" for k, v in values.items()))
    manager.wait_until_finished()
    writer.close()
  return state


def _manager(folder: pathlib.Path, cfg: LoopConfig) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
      folder / "checkpoints",
      options=ocp.CheckpointManagerOptions(
          max_to_keep=cfg.keep, enable_async_checkpointing=True
      ),
  )


def _save(manager, step, state, iterator) -> None:
  manager.save(step, args=ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=grain.checkpoint.CheckpointSave(iterator),
  ))


def _restore(manager, state: TrainState, iterator) -> TrainState:
  step = manager.latest_step()
  if step is None:
    return state
  restored = manager.restore(step, args=ocp.args.Composite(
      state=ocp.args.StandardRestore(jax.tree.map(
          ocp.utils.to_shape_dtype_struct, state)),
      data=grain.checkpoint.CheckpointRestore(iterator),
  ))
  return restored["state"]


def _check_finite(values: Mapping[str, float], step: int, manager) -> None:
  bad = [name for name, value in values.items() if not math.isfinite(value)]
  if bad:
    manager.wait_until_finished()
    raise UserError(
        f"got {bad[0]}={values[bad[0]]} at step {step}, expected a finite "
        f"number; the last good checkpoint is step {manager.latest_step()}, "
        "lower the learning rate and start again"
    )


def _write(writer, values: Mapping[str, float], step: int) -> None:
  for name, value in values.items():
    writer.add_scalar(name, value, step)
  writer.flush()
