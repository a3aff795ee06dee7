"""Body of infer.convert: a published checkpoint becomes a model folder."""

import pathlib

from absl import flags, logging
from tqdm import tqdm

from ssd_jax import convert, hub
from ssd_jax.cli import run as cli
from ssd_jax.config import UserError
from ssd_jax.families import anole, emu3, janus, llamagen, lumina
from ssd_jax.names import Recipe

RECIPES = {
    "llamagen": llamagen.recipe, "lumina": lumina.recipe,
    "anole": anole.recipe, "janus": janus.recipe, "emu3": emu3.recipe,
}
_PLACES = ("source", "vq", "text_encoder", "tokenizer")


def define_flags() -> None:
  """Defines the command's flags."""
  where = "a folder or hf:ORG/NAME"
  flags.DEFINE_string("source", None, f"The trunk's checkpoint: {where}.")
  flags.DEFINE_string("out", None, "The model folder to be made.")
  for name, what in (("vq", "image tokenizer"), ("text_encoder", "T5 encoder"),
                     ("tokenizer", "tokenizer of texts")):
    flags.DEFINE_string(
        name, None, f"The {what}'s files: {where}; default: in --source."
        + (" `none` leaves it out: prompts are then files of its features."
           if name == "text_encoder" else ""))
  flags.DEFINE_enum(
      "dtype", "bfloat16", sorted(convert.DTYPES),
      "Of the stored trunk; image tokenizers stay in float32.")


def body() -> None:
  """Converts as the flags say."""
  logging.set_verbosity(logging.ERROR)  # orbax warns of empty checkpoints
  values = flags.FLAGS
  recipe = recipe_of(values.config)
  for name in ("source", "out"):
    if not getattr(values, name):
      raise UserError(f"got no --{name}, expected a folder; give one")
  given = {name: getattr(values, name) for name in _PLACES
           if getattr(values, name)}
  if given.get("text_encoder") == "none":
    del given["text_encoder"]
    recipe = recipe.without_text_encoder()
  _check_places(recipe, given)
  folders = {name: hub.folder_of(source, _wanted(recipe, name, given))
             for name, source in given.items()}
  job = convert.open_job(recipe, folders, values.dtype)
  out = pathlib.Path(values.out)
  if convert.finished(job, out) is not None:
    print(f"{out} already holds this conversion; nothing to do")
    return
  with tqdm(total=job.size, unit="B", unit_scale=True, desc="converting",
            disable=None) as bar:
    report = convert.convert(job, out, bar.update)
  counts = ", ".join(f"{name} {count:,}"
                     for name, count in report["parameters"].items())
  print(f"wrote {out}: {counts} parameters, {report['bytes'] / 1e9:.2f} GB, "
        f"{len(report['arrays'])} pieces with checksums in "
        f"{out / 'report.json'}")


def recipe_of(config) -> Recipe:
  """The recipe of a configuration.

  Raises:
    UserError: when its family is not converted.
  """
  if config.family not in RECIPES:
    raise UserError(
        f"got family {config.family!r}, expected one of {sorted(RECIPES)}; "
        "choose --config configs/NAME.py of a published family")
  return RECIPES[config.family](config)


def _check_places(recipe: Recipe, given: dict[str, str]) -> None:
  """Raises UserError on a flag that this family has no use for."""
  known = {"source", *(part.flag for part in recipe.parts)}
  known |= {"tokenizer"} if recipe.tokenizer else set()
  for name in given:
    if name not in known:
      raise UserError(
          f"got --{name} {given[name]}, expected only "
          f"{', '.join(sorted('--' + flag for flag in known))} for "
          f"{recipe.family}; leave it out")


def _wanted(recipe: Recipe, flag: str, given: dict) -> list[tuple[str, ...]]:
  """What is looked for in the place that a flag names."""
  home = lambda name: name if name in given else "source"
  wanted = [
      part.patterns if part.flag == flag else part.inside
      for part in recipe.parts if home(part.flag) == flag]
  if home("tokenizer") == flag:
    wanted += [(pattern,) for pattern in recipe.tokenizer]
  return wanted


def main() -> None:
  """Console entry point."""
  cli.define_config()
  define_flags()
  cli.main(body)
