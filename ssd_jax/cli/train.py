"""Bodies of train.tokenizer, train.ar and train.mtp.

All parts of a model are trained in one working directory:

  DIR/tokenizer, DIR/ar, DIR/mtp   checkpoints and TensorBoard logs of each run
  DIR/model                        what inference loads, written when a run ends

Heads are trained for a model that is already whole: config.checkpoint, by
default DIR/model.
"""

import pathlib

from absl import flags
import numpy as np

from ssd_jax import checkpoints, exporters, loading
from ssd_jax.cli import run as cli
from ssd_jax.config import UserError, from_config_dict
from ssd_jax.data import sources
from ssd_jax.data.features import Teacher
from ssd_jax.families import emoji
from ssd_jax.models.text import Vocabulary
from ssd_jax.models.vq import VQ, VQConfig
from ssd_jax.pipeline import Pipeline
from ssd_jax.training import (
  ar as ar_training,
  mtp as mtp_training,
  tokenizer as tokenizer_training,
)

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints, logs and the model; default: the "
    "config's workdir.",
)
_STORED = np.float16


def tokenizer() -> None:
  """Trains the VQ tokenizer into DIR/tokenizer, exports DIR/model/vq."""
  config, workdir = _settings()
  vq_cfg = from_config_dict(VQConfig, config.vq)
  cfg = from_config_dict(tokenizer_training.TokenizerConfig, config.tokenizer)
  state = tokenizer_training.run(
      vq_cfg, cfg, _splits(config), str(workdir / "tokenizer")
  )
  checkpoints.save(workdir / "model" / "vq", state.eval_params, _STORED)
  print(f"wrote {workdir / 'model' / 'vq'}")


def ar() -> None:
  """Trains the trunk into DIR/ar, exports DIR/model/trunk and model.json."""
  config, workdir = _settings()
  vq_cfg = from_config_dict(VQConfig, config.vq)
  cfg = from_config_dict(ar_training.ARConfig, config.ar)
  vq_params = checkpoints.cast(
      checkpoints.restore(workdir / "model" / "vq"), np.float32
  )
  splits = {
      name: ar_training.encode_split(
          VQ(vq_cfg), vq_params, source, workdir / "ar" / f"{name}_tokens.npy"
      )
      for name, source in _splits(config).items()
  }
  words = Vocabulary.build(splits["train"].texts(), config.prompt_slots)
  generator = emoji.generator(config.trunk, vq_cfg, config.pixels, words)
  state = ar_training.run(generator, words, splits, cfg, str(workdir / "ar"))
  checkpoints.save(
      workdir / "model" / "trunk", state.eval_params["trunk"], _STORED
  )
  emoji.write_settings(workdir / "model", config, words)
  print(f"wrote {workdir / 'model'}")


def mtp() -> None:
  """Trains spatial heads into DIR/mtp, exports DIR/model/heads."""
  config = flags.FLAGS.config
  workdir = pathlib.Path(_WORKDIR.value or config.workdir)
  cfg = from_config_dict(mtp_training.MTPConfig, config.mtp)
  pipe = _model(config, workdir)
  settings, guided = pipe.sampling()
  teacher = Teacher(
      pipe.family.generator, {"trunk": pipe.params["trunk"]},
      pipe.family.encode_prompts, settings, guided,
  )
  state, heads_cfg = mtp_training.run(
      teacher, _captions(config), cfg, workdir / "mtp"
  )
  out = workdir / "model" / "heads"
  loading.write_extra(out, "heads", heads_cfg, state.eval_params, _STORED)
  print(f"wrote {out}; acceptance: {workdir / 'mtp' / 'acceptance.md'}")


def _model(config, workdir: pathlib.Path) -> Pipeline:
  """The whole model that heads or a drafter are trained for."""
  folder = pathlib.Path(config.checkpoint or workdir / "model")
  if not (folder / "model.json").exists():
    how = ("train.tokenizer and train.ar, or set --config.checkpoint=emoji for "
           "the embedded model" if config.family == "emoji" else
           f"infer.convert --config configs/{config.family}.py --out {folder}")
    if config.checkpoint == "emoji":
      return loading.load("emoji")
    raise UserError(
        f"got no model at {folder}, expected a whole one; make it with {how}"
    )
  return loading.load(folder)


def _captions(config) -> dict[str, list[str]]:
  """Captions to draw, by split."""
  if config.prompts_file:
    items = exporters.read_prompts(config.prompts_file)
    lines = [item.prompt for item in items]
    held_out = max(1, len(lines) // 20)
    return {"train": lines[held_out:], "validation": lines[:held_out]}
  return {
      split: [e.label for e in sources.emoji_records(split, tones=False)]
      * config.images_per_caption
      for split in ("train", "validation")
  }


def _settings():
  config = flags.FLAGS.config
  if config.family != "emoji":
    raise UserError(
        f"got family {config.family!r}, expected 'emoji': published trunks and "
        "tokenizers are converted, not trained; see infer.convert"
    )
  return config, pathlib.Path(_WORKDIR.value or config.workdir)


def _splits(config) -> dict:
  return {
      split: sources.open_source(config.data, split, config.pixels)
      for split in ("train", "validation")
  }


def main(body) -> None:
  """Runs a training command."""
  cli.define_config()
  cli.main(body)


def main_tokenizer() -> None:
  """Console entry point."""
  main(tokenizer)


def main_mtp() -> None:
  """Console entry point."""
  main(mtp)


def main_ar() -> None:
  """Console entry point."""
  main(ar)
