"""Body of infer.convert: a published checkpoint becomes a model folder."""

import pathlib

from absl import flags, logging

from ssd_jax.cli import run as cli
from ssd_jax.convert import (
  anole,
  convert,
  emu3,
  emu3_5,
  hub,
  janus,
  liquid,
  llamagen,
  lumina,
  lumina2,
  simplear,
)
from ssd_jax.convert.recipes import Recipe
from ssd_jax.core.config import UserError
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage.files import user_path

RECIPES = {
    "llamagen": llamagen.recipe, "lumina": lumina.recipe,
    "anole": anole.recipe, "janus": janus.recipe, "emu3": emu3.recipe,
    "emu3_5": emu3_5.recipe, "liquid": liquid.recipe,
    "lumina2": lumina2.recipe, "simplear": simplear.recipe,
}
_WHAT = {"source": "trunk", "vq": "image tokenizer",
         "text_encoder": "T5 encoder", "tokenizer": "tokenizer of texts"}


def define_flags() -> None:
  """Defines the command's flags."""
  where = "a folder or hf:ORG/NAME"
  flags.DEFINE_string("source", None, f"The trunk's checkpoint: {where}.")
  flags.DEFINE_string("out", None, "The model folder to be made.")
  for name in ("vq", "text_encoder", "tokenizer"):
    flags.DEFINE_string(
        name, None, f"The {_WHAT[name]}'s files: {where}; default: in --source."
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
      raise UserError(f"Expected a folder, got no --{name}. Give one.")
  given = {name: getattr(values, name) for name in _WHAT
           if getattr(values, name)}
  if given.get("text_encoder") == "none":
    del given["text_encoder"]
    recipe = recipe.without_text_encoder()
  _check_places(recipe, given)
  folders = fetched(
      recipe, {name: hub.Location(source) for name, source in given.items()})
  job = convert.open_job(recipe, folders, values.dtype)
  out = user_path(values.out)
  if convert.existing_report(job, out) is not None:
    print(f"{out} already holds this conversion; nothing to do")
    return
  with Bar(total=job.size, unit="B", unit_scale=True,
           desc="converting") as bar:
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
        f"Expected one of {sorted(RECIPES)}, got family {config.family!r}. "
        "Choose --config configs/NAME.py of a published family.")
  return RECIPES[config.family](config)


def _check_places(recipe: Recipe, given: dict[str, str]) -> None:
  """Raises UserError on a flag that this family has no use for."""
  known = {"source", *(part.flag for part in recipe.parts)}
  known |= {"tokenizer"} if recipe.tokenizer else set()
  for name in given:
    if name not in known:
      raise UserError(
          f"Expected only {', '.join(sorted('--' + flag for flag in known))} "
          f"for {recipe.family}, got --{name} {given[name]}. Leave it out.")


def fetched(
    recipe: Recipe, places: dict[str, hub.Location]
) -> dict[str, pathlib.Path]:
  """The local folder of each flag; nothing is fetched before all is found.

  Raises:
    UserError: when a place lacks what is looked for there, or is out of reach.
  """
  wanted: dict[str, list[tuple[str, ...]]] = {name: [] for name in places}
  for part in recipe.parts:
    is_own = part.flag in places
    flag = part.flag if is_own else "source"
    patterns = part.patterns if is_own else part.source_patterns
    if not (is_own and places[flag].path.is_file()):
      _find(_WHAT[part.flag], part.flag, [places[flag]], patterns)
    wanted[flag].append(patterns)
  flags = [name for name in convert.tokenizer_flags(places) if name in places]
  for pattern in recipe.tokenizer:
    found = _find(_WHAT["tokenizer"], "tokenizer",
                  [places[name] for name in flags], (pattern,))
    wanted[flags[found]].append((pattern,))
  return {name: place.folder(wanted[name]) for name, place in places.items()}


def _find(
    what: str, flag: str, places: list[hub.Location], patterns: tuple[str, ...]
) -> int:
  """The index of the first place that has a file.

  Raises:
    UserError: when none has.
  """
  for i, place in enumerate(places):
    if place.has(patterns):
      return i
  raise UserError(
      f"Expected the {what}'s files, got "
      f"{' and '.join(place.source for place in places)} without any of "
      f"{', '.join(patterns)}. Say where they are with --{flag}.")


def main() -> None:
  """Console entry point."""
  cli.define_config()
  define_flags()
  cli.main(body)
