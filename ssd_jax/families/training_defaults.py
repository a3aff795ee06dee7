"""Default settings of train.mtp and train.drafter.

All keys are listed, so that each can be changed on the command line. The
defaults are those of the papers (SSD, arXiv:2606.20543, table 8; LANTERN,
arXiv:2410.03355).
"""

import math

import ml_collections

_MTP_EPOCHS, _DRAFTER_EPOCHS = 3, 20
_DRAFTER_BATCH = 16


def add(
    config: ml_collections.ConfigDict, prompts: int, batch: int
) -> None:
  """Adds settings that train heads and a drafter for a converted checkpoint.

  Args:
    config: Settings of a published family, including `workdir`.
    prompts: Number of images generated for training.
    batch: Images per step when heads are trained, over all devices.
  """
  name = config.workdir.removeprefix("runs/")
  config.checkpoint = f"models/{name}"  # a folder made by infer.convert
  config.prompts_file = "prompts.txt"
  config.num_prompts = prompts  # largest number read; 0 reads all
  config.images_per_caption = 1
  config.mtp = mtp(_MTP_EPOCHS * prompts // batch, batch)
  config.drafter = drafter(
      _DRAFTER_EPOCHS * prompts // _DRAFTER_BATCH, _DRAFTER_BATCH)


def mtp(
    steps: int, batch: int, vertical: int = 5
) -> ml_collections.ConfigDict:
  """Returns the settings of train.mtp.

  Args:
    steps: Number of steps.
    batch: Images per step.
    vertical: Number of vertical heads.
  """
  return ml_collections.ConfigDict(dict(
      # inputs: h+e, h, e; target: pre, post, embedding, token (table 3), or
      # distribution (ours).
      heads=dict(horizontal=5, vertical=vertical, inputs="h+e", target="pre",
                 wrap=False),
      draw=dict(batch=16, shard=256, seed=0, decoder="exact"),
      optimizer=_optimizer(
          learning_rate=1e-4, warmup_steps=20, weight_decay=0.01,
          clip=math.inf),
      loop=_loop(steps, batch),
      drop_caption=0.1, eval_images=64,
      # Decodes the first held-out prompts every so many steps; 0 never.
      watch=dict(every=500, prompts=8, decoders=()),
  ))


def drafter(steps: int, batch: int) -> ml_collections.ConfigDict:
  """Returns the settings of train.drafter: EAGLE's, with the plain loss.

  Args:
    steps: Number of steps.
    batch: Images per step.
  """
  return ml_collections.ConfigDict(dict(
      optimizer=_optimizer(
          learning_rate=1e-4, warmup_steps=100, weight_decay=0.0, clip=0.5),
      loop=_loop(steps, batch),
      # EAGLE-3: e.g. taps=(2, 4), state_weight=0, token_weight=1, unroll=3.
      taps=(), state_weight=1.0, token_weight=0.1, noise=0.2, unroll=1,
      # CASCADE: redundancy above 0.
      redundancy=0.0, likeness=0.95, eval_images=64, depth=5,
  ))


def _optimizer(**changes) -> dict:
  return dict(
      kind="adamw", final_learning_rate=1e-5, b1=0.9, b2=0.95, ema=0.0
  ) | changes


def _loop(steps: int, batch: int) -> dict:
  return dict(steps=steps, batch=batch, accumulate=1, log_every=10,
              eval_every=200, save_every=100, keep=2, seed=0)
