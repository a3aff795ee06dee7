"""A training run of milliseconds, and what can befall it; run as a program by
tests of training/ and runtime/.

    python -m tests.support.tiny_training --workdir DIR \\
        [--die_at STEP] [--hosts' flags]
    python -m tests.support.tiny_training --workdir DIR --kills 20
"""

import train as _  # noqa: F401, I001 (Ctrl-C while importing, as commands)

import os
import pathlib
import random
import signal
import time

from absl import flags
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.cli import run as cli
from ssd_jax.core.config import LoopConfig, OptimizerConfig
from ssd_jax.core.grid import Grid
from ssd_jax.data import stream as data_stream
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.models.vocabulary import Vocabulary
from ssd_jax.pipeline import testing
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import sharding
from ssd_jax.storage import checkpoints
from ssd_jax.training import loop, self_distillation
from ssd_jax.training.self_distillation import GenerationConfig, Teacher
from ssd_jax.training.state import TrainState, apply_gradients, make_optimizer

STEPS = 12


def train(workdir, steps=STEPS, die_at=None, save_every=2, batch=8, width=4):
  """State after fitting a matrix; SIGKILLs itself in step `die_at`."""
  cfg = LoopConfig(steps=steps, batch=batch, log_every=1,
                   save_every=save_every, eval_every=100, keep=3)
  opt_cfg = OptimizerConfig(learning_rate=0.05, warmup_steps=1, ema=0.9)
  # The schedule must not depend on how far this run goes.
  optimizer = make_optimizer(opt_cfg, LoopConfig(steps=100))
  state = TrainState.make({"w1": jnp.zeros((8, width))}, optimizer, opt_cfg)
  load = lambda source, index, rng: {
      "x": rng.normal(size=8).astype(np.float32)}
  data = data_stream.stream(range(100), load, cfg.batch, 1)

  @jax.jit
  def update(state, x):
    loss = lambda p: jnp.mean((x @ p["w1"] - x[:, :width]) ** 2)
    value, grads = jax.value_and_grad(loss)(state.params)
    return apply_gradients(state, grads, optimizer, opt_cfg), value

  def step(state, batch):
    if die_at is not None and int(state.step) == die_at:
      os.kill(os.getpid(), signal.SIGKILL)
    state, value = update(state, batch["x"])
    return state, {"loss": value}

  return loop.train(str(workdir), state, step, data, cfg)


def teacher(is_reported=False):
  """A tiny trunk that generates 2x2 images; it may hear SIGTERM as it begins
  the seventh."""
  kind = SignalledFamily if is_reported else testing.TinyFamily
  family = kind(ml_collections.ConfigDict(), Vocabulary((), 8), Grid(2, 2), 3)
  params = sharding.shard_params(
      jax.jit(family.generator.init)(jax.random.key(0)))
  pipe = Pipeline(family, params, None, family.generator.model())
  return Teacher(pipe, Sampling.make(), False)


class SignalledFamily(testing.TinyFamily):
  """Sends SIGTERM to its process as it encodes the prompt "6"."""

  def encode_prompts(self, prompts, guided):
    if "6" in prompts:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(2)  # until all hosts know
    return super().encode_prompts(prompts, guided)


def body():
  """Generates, trains, and leaves DIR/generated.npy and DIR/weights."""
  folder = pathlib.Path(flags.FLAGS.workdir)
  if flags.FLAGS.draws:
    is_reported = flags.FLAGS.is_reported and jax.process_index() > 0
    drawn = self_distillation.generate_images(
        teacher(is_reported), [str(i) for i in range(10)],
        GenerationConfig(batch=4, shard=4), folder / "tokens")
    if jax.process_index() == 0:
      np.save(folder / "drawn.npy", drawn.tokens)
  die_at = flags.FLAGS.die_at if jax.process_index() else None
  state = train(folder / "run", flags.FLAGS.steps, die_at=die_at)
  checkpoints.save(folder / "weights", state.ema)


def kill_often(folder, times):
  """Children that train are killed at random moments; the last one ends."""
  rng = random.Random(0)
  saved = folder / "run" / "checkpoints"
  for turn in range(times):
    child = _fork(lambda: train(folder / "run", 10_000, save_every=1))
    before = _newest(saved)
    while _newest(saved) <= before:  # it resumes, and saves again
      time.sleep(0.005)
      assert os.waitpid(child, os.WNOHANG)[0] == 0, f"child {turn} ended"
    time.sleep(rng.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
  steps = _newest(saved) + 3
  for name in ("run", "whole"):
    child = _fork(lambda name=name: checkpoints.save(
        folder / f"weights_{name}", train(folder / name, steps).params))
    assert os.waitpid(child, 0)[1] == 0


def _newest(folder):
  names = os.listdir(folder) if folder.is_dir() else []
  return max((int(n) for n in names if n.isdigit()), default=-1)


def _fork(function):
  """A child's number; nothing of JAX runs yet, so that a fork is safe."""
  child = os.fork()
  if child == 0:
    try:
      function()
    except BaseException:
      os._exit(1)
    os._exit(0)
  return child


def main():
  flags.DEFINE_string("workdir", None, "Folder.")
  flags.DEFINE_integer("die_at", None, "Step in which the last host dies.")
  flags.DEFINE_integer("steps", STEPS, "Of the training.")
  flags.DEFINE_integer("kills", 0, "How often a child is killed.")
  flags.DEFINE_bool("is_reported", False, "Whether the last host hears SIGTERM "
                    "while images are drawn.")
  flags.DEFINE_bool("draws", False, "Whether images are drawn first.")
  cli.define_config()
  jax.config.update("jax_disable_most_optimizations", True)
  kills = lambda: kill_often(
      pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.kills)
  cli.main(lambda: (kills if flags.FLAGS.kills else body)())


if __name__ == "__main__":
  main()
