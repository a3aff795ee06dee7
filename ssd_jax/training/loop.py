"""The loop of all training commands: steps, logs and checkpoints.

A checkpoint holds the train state and the position in the data stream. It is
written asynchronously and appears with one rename, so a run that is killed at
any moment continues from the last complete checkpoint without a difference.
Where a mesh is set, it holds the state and batches; see `sharding`.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from typing import Any
import zlib

import grain
import jax
import orbax.checkpoint as ocp
import tensorboardX

from ssd_jax.core.config import LoopConfig, UserError
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage import checkpoints
from ssd_jax.storage.files import real_path
from ssd_jax.training.preemption import Preemption
from ssd_jax.training.state import TrainState, checksum_tree

Metrics = Mapping[str, jax.Array]
StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Evaluate = Callable[[TrainState], Mapping[str, float]]

# Errors of orbax and tensorstore for lost, truncated or altered files.
_DAMAGED = (ValueError, KeyError, TypeError, EOFError, FileNotFoundError,
            NotADirectoryError, IsADirectoryError)
# Words of errors of these types for files that may be intact.
_NOT_DAMAGED = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE",
                "DEADLINE_EXCEEDED", "Too many open files")


def train(
    workdir: str,
    state: TrainState,
    step_fn: StepFn,
    data: grain.IterDataset,
    cfg: LoopConfig,
    evaluate: Evaluate | None = None,
    decode: Evaluate | None = None,
    decode_every: int = 0,
    least_seconds: float | None = None,
) -> TrainState:
  """Trains to `cfg.steps` steps, continuing from the checkpoints in `workdir`.

  Args:
    workdir: Folder of checkpoints and TensorBoard files.
    state: State before the first step; gives the shapes when resuming.
    step_fn: Jitted step; takes the state, which it donates, and a batch.
    data: Endless stream of this host's share of the batches.
    cfg: Numbers of steps.
    evaluate: Returns figures to log; called every `cfg.eval_every` steps.
    decode: As `evaluate`; called every `decode_every` steps, 0 for never.
    decode_every: Steps between two calls of `decode`.
    least_seconds: Seconds of a step at the devices' peak, for the log's "mfu".

  Returns:
    The state after the last step.

  Raises:
    UserError: if a loss is not finite; the message names the last good
      checkpoint.
    SystemExit: with 0 after SIGTERM or 130 after Ctrl-C, once the state is
      saved.
  """
  folder = real_path(workdir)
  rows = cfg.batch // sharding.host_share()[1]
  for name in ("checkpoints", "logs"):
    _make_folder(folder / name)
  with Preemption() as preemption, _manager(folder, cfg) as manager:
    state, iterator = _restore(manager, sharding.shard_params(state), data)
    start = int(state.step)
    log = _Log(folder, start, cfg.steps, least_seconds)
    for step in log.bar:
      batch = sharding.global_rows(next(iterator), rows)
      state, metrics = step_fn(state, batch)
      done = step + 1
      is_due = lambda every, done=done: done % every == 0 or done == cfg.steps
      is_preempted = preemption.is_due()
      if is_due(cfg.log_every) or is_due(cfg.save_every) or is_preempted:
        values = {k: float(v) for k, v in metrics.items()}
        _check_finite(values, done, manager)
        log.write(values, done)
      if is_due(cfg.save_every) or is_preempted:
        _save(manager, done, state, iterator)
      if is_preempted and done < cfg.steps:
        _wait(manager)
        log.close()
        preemption.stop(f"saved step {done}")
      with log.pause():
        if evaluate and is_due(cfg.eval_every):
          log.print(evaluate(state), done)
        if decode and 0 < decode_every <= done and is_due(decode_every):
          log.print(decode(state), done)
    _wait(manager)
    log.close()
  return state


def _make_folder(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:  # orbax would wait for the folder
    raise UserError(
        f"Expected a folder to write to, got {folder}, which is not a folder "
        f"and cannot be created ({error.strerror}). Remove it or choose "
        "another workdir.") from error


def _manager(folder: pathlib.Path, cfg: LoopConfig) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
      folder / "checkpoints",
      options=ocp.CheckpointManagerOptions(
          max_to_keep=cfg.keep, enable_async_checkpointing=True,
          cleanup_tmp_directories=True  # of runs that were killed
      ),
  )


def _save(manager, step, state, iterator) -> None:
  try:
    manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.checkpoint.CheckpointSave(iterator),
        sums=ocp.args.JsonSave(_sums(state, iterator)),
    ))
  except (OSError, ValueError) as error:  # of this save or the one before
    raise _cannot_write(manager, step, error) from error


def _wait(manager) -> None:
  try:
    manager.wait_until_finished()
  except (OSError, ValueError) as error:
    raise _cannot_write(manager, manager.latest_step(), error) from error


def _cannot_write(manager, step, error) -> UserError:
  reason = (str(error).splitlines() or [type(error).__name__])[0]
  return UserError(
      "Expected space and permission to write, got no checkpoint written in "
      f"{manager.directory} up to step {step} ({reason[:160]}). Provide both "
      "and start again to continue from the last complete checkpoint.")


def _restore(manager, state: TrainState, data: grain.IterDataset):
  """Returns (state, iterator) of the newest intact checkpoint or the start."""
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  damaged: dict[int, Exception] = {}
  for step in sorted(manager.all_steps(), reverse=True):
    _check_same_run(manager, step, shapes)
    try:
      with checkpoints.silenced():
        found = manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes)))
      iterator = _resume(manager, step, data)
      _check_sums(manager, step, _sums(found["state"], iterator))
    except _DAMAGED as error:
      if not _is_damage(error):
        raise
      damaged[step] = error
      if jax.process_count() > 1:
        break  # hosts cannot agree on another; the user removes the folder
      continue
    for newer in damaged:
      _set_aside(manager, newer)
    return found["state"], iterator
  if damaged:
    newest = damaged[max(damaged)]
    reason = (str(newest).splitlines() or [type(newest).__name__])[0]
    raise UserError(
        "Expected an intact checkpoint of this run, got damaged checkpoints in "
        f"{manager.directory} ({reason[:120]}). Remove that folder to start "
        "anew."
    ) from newest
  return state, iter(data)


def _is_damage(error: Exception) -> bool:
  """Returns whether an error means damaged files, not a disk or user error."""
  return not isinstance(error, UserError) and not any(
      word in str(error) for word in _NOT_DAMAGED)


def _sums(state: TrainState, iterator: Any) -> dict[str, int]:
  """Returns a checksum per array and, on a single host, of the data stream."""
  names, leaves = zip(
      *jax.tree_util.tree_flatten_with_path(state)[0], strict=True)
  sums = map(int, jax.device_get(checksum_tree(leaves)))
  found = dict(zip(map(jax.tree_util.keystr, names), sums, strict=True))
  if jax.process_count() == 1:
    position = json.dumps(iterator.get_state(), sort_keys=True, default=str)
    found["data"] = zlib.crc32(position.encode())
  return found


def _check_sums(manager, step: int, found: Mapping[str, int]) -> None:
  """Raises ValueError if a restored array differs from its saved checksum."""
  if not (pathlib.Path(manager.directory) / str(step) / "sums").is_dir():
    return
  saved = manager.restore(
      step, args=ocp.args.Composite(sums=ocp.args.JsonRestore()))["sums"]
  for name in saved.keys() & found.keys():
    if saved[name] != found[name]:
      raise ValueError(f"{name} differs from its checksum")


def _check_same_run(manager, step: int, state: TrainState) -> None:
  """Raises UserError if a readable checkpoint has other arrays."""
  folder = pathlib.Path(manager.directory) / str(step) / "state"
  try:
    with checkpoints.silenced(), ocp.StandardCheckpointer() as checkpointer:
      saved = checkpointer.metadata(folder).item_metadata.tree
  except (*_DAMAGED, AttributeError):  # restoring it reports the damage
    return
  checkpoints.check_shapes(
      folder, saved, state,
      "by these settings", "Set them back, or choose another workdir")


def _set_aside(manager, step: int) -> None:
  """Moves a damaged checkpoint out of the way and prints its new path."""
  folder = pathlib.Path(manager.directory)
  aside = folder.with_name("damaged") / f"{step}-{time.time_ns()}"
  _make_folder(aside.parent)
  os.rename(folder / str(step), aside)
  manager.reload()
  print(f"checkpoint {step} of {folder} is damaged: moved to {aside}",
        file=sys.stderr)


def _resume(manager, step: int, data: grain.IterDataset):
  """Returns the iterator after `step` batches."""
  iterator, index = iter(data), jax.process_index()
  name = f"process_{index}-of-{jax.process_count()}.json"
  if (pathlib.Path(manager.directory) / str(step) / "data" / name).exists():
    manager.restore(step, args=ocp.args.Composite(
        data=grain.checkpoint.CheckpointRestore(iterator)))
    return iterator
  for _ in range(step):  # saved by other hosts, whose positions differ
    next(iterator)
  return iterator


def _check_finite(values: Mapping[str, float], step: int, manager) -> None:
  bad = [name for name, value in values.items() if not math.isfinite(value)]
  if bad:
    _wait(manager)
    raise UserError(
        f"Expected a finite number, got {bad[0]}={values[bad[0]]} at step "
        f"{step}. Lower the learning rate and start again from the last good "
        f"checkpoint, step {manager.latest_step()}."
    )


class _Log:
  """Progress bar and TensorBoard log of the first host."""

  def __init__(
      self, folder: pathlib.Path, start: int, steps: int,
      least_seconds: float | None,
  ):
    is_first = jax.process_index() == 0
    self._steps, self._least = steps, least_seconds
    self._timed = start  # the step that the clock counts from
    self._clock: float | None = None  # starts behind what is compiled
    self._writer = None
    if is_first:
      self._writer = tensorboardX.SummaryWriter(
          str(folder / "logs"), purge_step=start)
    self.bar = Bar(
        range(start, steps), initial=start, total=steps, desc=folder.name,
        mininterval=1.0, disable=not is_first)

  def write(self, values: Mapping[str, float], step: int) -> None:
    """Shows figures beside the bar and logs them."""
    self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
    self._record({**values, **self._speed(step)}, step)

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves the time of what runs inside out of the steps' time."""
    start = time.perf_counter()
    yield
    if self._clock is not None:
      self._clock += time.perf_counter() - start

  def _speed(self, step: int) -> dict[str, float]:
    """Returns the time of a step since the last call, and what follows."""
    now, begun = time.perf_counter(), self._clock
    steps, self._clock, self._timed = step - self._timed, now, step
    if begun is None or not steps:
      return {}
    seconds = (now - begun) / steps
    found = {"step_seconds": seconds,
             "hours_left": (self._steps - step) * seconds / 3600}
    if self._least:
      found["mfu"] = self._least / seconds
    return found

  def print(self, values: Mapping[str, float], step: int) -> None:
    """Prints figures on a line of their own and logs them."""
    self._record(values, step)
    if self._writer:
      self.bar.write(f"step {step}: " + ", ".join(
          f"{k} {v:.4g}" for k, v in values.items()))

  def close(self) -> None:
    """Closes the TensorBoard log."""
    if self._writer:
      self._writer.close()

  def _record(self, values: Mapping[str, float], step: int) -> None:
    if self._writer:
      for name, value in values.items():
        self._writer.add_scalar(name, value, step)
      self._writer.flush()
