"""The commands train.tokenizer, train.ar, train.mtp and train.drafter.

All parts of a model are trained in one working directory:

  DIR/tokenizer, ar, mtp, drafter  checkpoints and TensorBoard logs of each run
  DIR/mtp/tokens                   training images of heads and drafter
  DIR/model                        inference model, written when a run ends

Heads and drafter are trained for a complete model: config.checkpoint, or
DIR/model by default.
"""

from collections.abc import Mapping
import pathlib
import shlex
import sys
from typing import Any

from absl import flags
import jax
from ml_collections import ConfigDict
import numpy as np

from ssd_jax.cli import config_overrides, run as cli
from ssd_jax.core.config import UserError, check, from_config_dict
from ssd_jax.data import sources
from ssd_jax.data.pictures import Source
from ssd_jax.data.survey import Survey, digest, survey_all
from ssd_jax.evaluation import prompt_files
from ssd_jax.families import emoji
from ssd_jax.models.vocabulary import Vocabulary
from ssd_jax.models.vq import VQ, VQConfig
from ssd_jax.performance import chips
from ssd_jax.pipeline import model_folder
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage import checkpoints
from ssd_jax.storage.files import storable_folder, user_path
from ssd_jax.training import (
  ar as ar_training,
  drafter as drafter_training,
  heads as mtp_training,
  run_record,
  tokenizer as tokenizer_training,
)
from ssd_jax.training.self_distillation import (
  GenerationConfig,
  Teacher,
  lossless_decoder,
)

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints, logs and the model; default: the "
    "config's workdir.",
)
_STORED = np.float16
_HELD_OUT = 256  # most held-out captions
_MODEL = ("data", "pixels", "vq")
_IMAGE_KEYS = ("prompts_file", "num_prompts", "images_per_caption", "sampling")


def tokenizer() -> None:
  """Trains the VQ tokenizer into DIR/tokenizer, exports DIR/model/vq."""
  config, workdir = _settings("tokenizer")
  vq_cfg = from_config_dict(VQConfig, config.vq)
  cfg = from_config_dict(tokenizer_training.TokenizerConfig, config.tokenizer)
  splits = _splits(config)
  images = {name: run_record.Listing.of_images(contents, captions=False)
            for name, contents in _surveys(splits).items()}
  run_record.begin(
      workdir / "tokenizer", _part_of(config, *_MODEL, "tokenizer"), {}, images)
  state = tokenizer_training.run(
      vq_cfg, cfg, splits, str(workdir / "tokenizer")
  )
  checkpoints.save(workdir / "model" / "vq", state.eval_params, _STORED)
  print(f"wrote {workdir / 'model' / 'vq'}")


def ar() -> None:
  """Trains the trunk into DIR/ar, exports DIR/model/trunk and model.json."""
  config, workdir = _settings("prompt_slots", "trunk", "ar", "sampling")
  vq_cfg = from_config_dict(VQConfig, config.vq)
  cfg = from_config_dict(ar_training.ARConfig, config.ar)
  captioned = _splits(config)
  vq_params = checkpoints.cast(_tokenizer_of(workdir), np.float32)
  contents = _surveys(captioned)
  words = Vocabulary.build(contents["train"].texts(), config.prompt_slots)
  settings = _part_of(config, *_MODEL, "prompt_slots", "trunk", "ar")
  settings["tokenizer"] = checkpoints.identity(workdir / "model" / "vq")
  run_record.begin(
      workdir / "ar", settings,
      {"vocabulary": f"{digest(' '.join(words.words)):016x}"},
      {name: run_record.Listing.of_images(x) for name, x in contents.items()})
  splits = {
      name: ar_training.encode_split(
          VQ(vq_cfg), vq_params, x, workdir / "ar" / f"{name}_tokens.npy")
      for name, x in contents.items()
  }
  generator = emoji.generator(config.trunk, vq_cfg, config.pixels, words)
  state = ar_training.run(generator, words, splits, cfg, str(workdir / "ar"))
  # Should this end between both writes, no vocabulary is beside another trunk.
  (workdir / "model" / "model.json").unlink(missing_ok=True)
  checkpoints.save(
      workdir / "model" / "trunk", state.eval_params["trunk"], _STORED
  )
  emoji.write_settings(workdir / "model", config, words)
  print(f"wrote {workdir / 'model'}")


def _tokenizer_of(workdir: pathlib.Path) -> Any:
  folder = workdir / "model" / "vq"
  if not folder.is_dir():
    raise UserError(
        f"Expected a trained tokenizer, got no tokenizer at {folder}. Run "
        f"python -m train.tokenizer --workdir {workdir} first.")
  return checkpoints.restore(folder)


def mtp() -> None:
  """Trains spatial heads into DIR/mtp, exports DIR/model/heads."""
  config, workdir = _distillation()
  cfg = from_config_dict(mtp_training.MTPConfig, config.mtp)
  captions = _captions(config)
  teacher = _teacher(config, workdir)
  lossless_decoder(teacher, cfg.draw)
  _begin_distilling(workdir, config, "mtp", teacher, captions)
  state, heads_cfg = mtp_training.run(
      teacher, captions, cfg, workdir / "mtp", chips.listed_flops())
  _export(workdir, "heads", heads_cfg, state)
  table = workdir / "mtp" / mtp_training.TABLE
  decoder = "ssd" if cfg.heads.vertical else "mtp"
  _print_table(config, workdir, "heads", decoder, table, captions)


def drafter() -> None:
  """Trains a drafter into DIR/drafter, exports DIR/model/drafter."""
  config, workdir = _distillation("drafter")
  cfg = from_config_dict(drafter_training.DrafterTraining, config.drafter)
  generation_cfg = from_config_dict(GenerationConfig, config.mtp.draw)
  captions = _captions(config)
  teacher = _teacher(config, workdir)
  lossless_decoder(teacher, generation_cfg)
  _begin_distilling(workdir, config, "drafter", teacher, captions)
  # Shared with train.mtp: the first of both commands generates the images.
  splits = mtp_training.generate_splits(
      teacher, captions, generation_cfg, workdir / "mtp")
  state, drafter_cfg = drafter_training.run(
      teacher, splits, cfg, workdir / "drafter")
  _export(workdir, "drafter", drafter_cfg, state)
  table = workdir / "drafter" / drafter_training.TABLE
  decoder = "cascade" if cfg.redundancy else "eagle"
  _print_table(config, workdir, "drafter", decoder, table, captions)


def _begin_distilling(
    workdir: pathlib.Path, config, kind: str, teacher: Teacher,
    captions: dict[str, list[str]],
) -> None:
  """Records what a run that learns from a model is made from, or checks it."""
  run_record.begin(
      workdir / kind, _part_of(config, *_IMAGE_KEYS, kind),
      {**teacher.parts, "mtp.draw.seed": str(config.mtp.draw.seed)},
      {split: run_record.Listing.of_texts(texts)
       for split, texts in captions.items()})


def _part_of(config, *keys: str) -> dict[str, Any]:
  """Returns some of the settings."""
  values = config.to_dict()
  return {key: values[key] for key in keys}


def _distillation(*more: str) -> tuple[ConfigDict, pathlib.Path]:
  """Returns (config, working directory) of training for a complete model."""
  config = flags.FLAGS.config
  cli.refuse_unused(
      "workdir", "checkpoint", "prompts_file", "num_prompts",
      "images_per_caption", "sampling", "data", "pixels", "mtp",
      *_choices(config), *more)
  workdir = _workdir(config)
  model_folder.require(_model_folder(config, workdir), config.family)
  return config, workdir


def _choices(config) -> tuple[str, ...]:
  """Returns the settings that the family reads at generation time."""
  return model_folder.CHOICES.get(config.family, ())


def _model_folder(config, workdir: pathlib.Path) -> str | pathlib.Path:
  """Returns the folder of the model that heads or a drafter are trained for."""
  return config.checkpoint or workdir / "model"


def _teacher(config, workdir: pathlib.Path) -> Teacher:
  """Returns the frozen trunk with the config's sampling settings."""
  folder = _model_folder(config, workdir)
  config_overrides.check_variant(folder, config)
  pipe = model_folder.load(
      folder, extras=False, choices=config_overrides.choices(config))
  chosen = {key: str(pipe.family.config[key]) for key in _choices(config)}
  return Teacher.of(
      pipe, model_folder.identity(folder) | chosen, **config.sampling)


def _export(workdir: pathlib.Path, kind: str, cfg, state) -> None:
  model_folder.write_extra(
      workdir / "model" / kind, kind, cfg, state.eval_params, _STORED)


def _print_table(
    config, workdir, kind: str, decoder: str, table, captions
) -> None:
  """Prints the acceptance table and a command that uses the trained part."""
  print(table.read_text())
  model = _model_folder(config, workdir)
  out = workdir / "model" / kind
  words = ["--checkpoint", model]
  if pathlib.Path(model) / kind != out:
    words += [f"--{kind}", out]
  words += ["--decoder", decoder, "--prompt", captions["validation"][0]]
  same = shlex.join(map(str, config_overrides.flags_of(config) + words))
  print(f"wrote {out}; the table is {table}. To generate with it:\n"
        f"python -m infer.generate {same}")


def _captions(config) -> dict[str, list[str]]:
  """Returns captions per split, at most num_prompts of the training split."""
  check(config.num_prompts >= 0, "num_prompts", config.num_prompts, ">= 0")
  if config.prompts_file:
    lines = _lines(config)
    held_out = min(max(1, len(lines) // 20), _HELD_OUT)
    splits = {"train": lines[held_out:], "validation": lines[:held_out]}
  elif "classes" in config and config.classes:
    names = [str(i) for i in range(config.classes)]
    splits = {"train": names, "validation": names[:_HELD_OUT]}
  elif config.family == "emoji":
    splits = {split: _data_captions(config, split)
              for split in ("train", "validation")}
  else:
    raise UserError(
        "Expected a file with a prompt per line, got no prompts_file. Name "
        "it with --config.prompts_file=FILE.")
  splits["train"] = splits["train"][:config.num_prompts or None]
  count = config.images_per_caption
  check(count >= 1, "images_per_caption", count, ">= 1")
  return {split: texts * count for split, texts in splits.items()}


def _data_captions(config, split: str) -> list[str]:
  """Returns the captions of the model's training data."""
  source = sources.open_source(config.data, split, config.pixels)
  if split == "train":
    _print_notes(source)
  return list(dict.fromkeys(map(source.caption, range(len(source)))))


def _lines(config) -> list[str]:
  """Returns distinct prompts of the config's file, at most num_prompts."""
  file = pathlib.Path(config.prompts_file)
  if not file.exists():
    raise UserError(
        "Expected a file with a prompt per line (the papers use Midjourney's), "
        f"got no file {file}. Write it or name another with "
        "--config.prompts_file=FILE.")
  texts = (item.prompt.strip() for item in prompt_files.read_prompts(file))
  lines = list(dict.fromkeys(filter(None, texts)))
  if len(lines) < 2:
    raise UserError(
        "Expected two or more prompts, one of them held out, got "
        f"{len(lines)} prompts in {file}. Add prompts.")
  return lines[:config.num_prompts or None]


def _settings(*used: str):
  cli.refuse_unused("workdir", "data", "pixels", "vq", *used)
  config = flags.FLAGS.config
  if config.family != "emoji":
    raise UserError(
        "Expected family 'emoji', because published trunks and tokenizers are "
        f"converted, not trained, got family {config.family!r}. See "
        "infer.convert."
    )
  return config, _workdir(config)


def _workdir(config) -> pathlib.Path:
  folder = user_path(_WORKDIR.value or config.workdir)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"Expected a folder, got --workdir {folder}, which is a "
                    "file. Choose another folder.")
  storable_folder(folder)  # fails before anything is trained
  return folder


def _splits(config) -> dict[str, Source]:
  found = sources.open_splits(
      config.data, ("train", "validation"), config.pixels)
  _print_notes(found["train"])
  return found


def _print_notes(source: Source) -> None:
  for note in source.notes:
    print(f"note: {note}", file=sys.stderr)


def _surveys(splits: Mapping[str, Source]) -> dict[str, Survey]:
  """Reads every image once; raises UserError that names all damaged ones."""
  total = sum(map(len, splits.values()))
  with Bar(total=total, desc="reading images", unit="image",
           disable=jax.process_index() > 0) as bar:
    return survey_all(splits, bar.update)


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


def main_drafter() -> None:
  """Console entry point."""
  main(drafter)


def main_ar() -> None:
  """Console entry point."""
  main(ar)
