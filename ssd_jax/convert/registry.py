"""Every family's recipe, and the files that it reads, downloaded if need be."""

import pathlib

import ml_collections

from ssd_jax.convert import (
  anole,
  convert,
  emu3,
  emu3_5,
  glm_image,
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

RECIPES = {
    "anole": anole.recipe, "emu3": emu3.recipe, "emu3_5": emu3_5.recipe,
    "glm_image": glm_image.recipe,
    "janus": janus.recipe, "liquid": liquid.recipe,
    "llamagen": llamagen.recipe, "lumina": lumina.recipe,
    "lumina2": lumina2.recipe, "simplear": simplear.recipe,
}
PARTS = {"source": "trunk", "vq": "image tokenizer",
         "text_encoder": "T5 encoder", "tokenizer": "tokenizer of texts"}


def recipe_of(config: ml_collections.ConfigDict) -> Recipe:
  """Returns the recipe of a configuration.

  Raises:
    UserError: when its family is not converted.
  """
  if config.family not in RECIPES:
    raise UserError(
        f"Expected one of {sorted(RECIPES)}, got family {config.family!r}. "
        "Choose --config configs/NAME.py of a published family.")
  return RECIPES[config.family](config)


def fetched(
    recipe: Recipe, places: dict[str, hub.Location]
) -> dict[str, pathlib.Path]:
  """Returns the local folder of each flag; nothing is fetched before all is
  found.

  Raises:
    UserError: when a place lacks what is looked for there, or is out of reach.
  """
  wanted: dict[str, list[tuple[str, ...]]] = {name: [] for name in places}
  for part in recipe.parts:
    is_own = part.flag in places
    flag = part.flag if is_own else "source"
    patterns = part.patterns if is_own else part.source_patterns
    if not (is_own and places[flag].path.is_file()):
      _find(PARTS[part.flag], part.flag, [places[flag]], patterns)
    wanted[flag].append(patterns)
  flags = [name for name in convert.tokenizer_flags(places) if name in places]
  for pattern in recipe.tokenizer:
    found = _find(PARTS["tokenizer"], "tokenizer",
                  [places[name] for name in flags], (pattern,))
    wanted[flags[found]].append((pattern,))
  return {name: place.folder(wanted[name]) for name, place in places.items()}


def _find(
    what: str, flag: str, places: list[hub.Location], patterns: tuple[str, ...]
) -> int:
  """Returns the index of the first place that has a file.

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
