"""Model folders: what training and infer.convert write and a pipeline reads.

  DIR/model.json        the family and its settings
  DIR/trunk, DIR/vq     orbax checkpoints
  DIR/heads             spatial heads: heads.json and weights, if any
  DIR/drafter           a drafter: drafter.json and weights, if any
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from ssd_jax import checkpoints
from ssd_jax.config import UserError, from_config_dict
from ssd_jax.families import anole, emoji, emu3, janus, llamagen, lumina
from ssd_jax.models.drafter import DrafterConfig, bind_drafter
from ssd_jax.models.spatial_heads import HeadsConfig, bind_heads
from ssd_jax.pipeline import Pipeline
from ssd_jax.types import Params

EMBEDDED = pathlib.Path(__file__).parent / "assets" / "emoji"
_FAMILIES = {
    "anole": anole.from_settings,
    "emoji": lambda settings, folder: emoji.from_settings(settings),
    "emu3": emu3.from_settings,
    "janus": janus.from_settings,
    "llamagen": llamagen.from_settings,
    "lumina": lumina.from_settings,
}
_CONFIGS = {"janus": "janus_pro"}  # where the file has another name
_KINDS = {"heads": HeadsConfig, "drafter": DrafterConfig}


def load(
    name: str | os.PathLike = "emoji", *, random_weights: bool = False,
    heads: str | os.PathLike | None = None,
    drafter: str | os.PathLike | None = None, extras: bool = True,
) -> Pipeline:
  """A pipeline from "emoji" (the embedded model) or a model folder.

  Args:
    name: "emoji", or a folder written by training or infer.convert.
    random_weights: Draw the trunk's parameters at random instead; the model's
      own heads and drafter, which belong to its trunk, are left out.
    heads: Folder of spatial heads, instead of the model's own.
    drafter: Folder of a drafter, instead of the model's own.
    extras: Whether the model's own heads and drafter are read.

  Raises:
    UserError: when the folder is no model, damaged, or its parts do not belong
      together.
  """
  folder = EMBEDDED if name == "emoji" else pathlib.Path(name)
  settings = checkpoints.read_json(folder / "model.json")
  if not isinstance(settings, dict) or settings.get("family") not in _FAMILIES:
    raise UserError(
        f"got {folder / 'model.json'} without a known family, expected one of "
        f"{sorted(_FAMILIES)}; check the folder"
    )
  family = _FAMILIES[settings["family"]](settings, folder)
  generator = family.generator
  if random_weights:
    params = jax.jit(generator.init)(jax.random.key(0))
  else:
    params = {"trunk": checkpoints.restore(folder / "trunk")}
  found = {}
  for kind, given in (("heads", heads), ("drafter", drafter)):
    own = folder / kind
    if given is not None or (
        extras and own.is_dir() and not random_weights):
      found[kind], params[kind] = read_extra(given or own, kind)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  params = checkpoints.cast(params, dtype)
  model = generator.model()
  if "heads" in found:
    model = bind_heads(generator, found["heads"], params)
  if "drafter" in found:
    model = bind_drafter(generator, model, found["drafter"], params)
  vq_params = checkpoints.cast(checkpoints.restore(folder / "vq"), jnp.float32)
  return Pipeline(family, params, vq_params, model)


def require(name: str | os.PathLike, family: str) -> None:
  """Raises UserError unless a model is there; says how to make one.

  Args:
    name: As for `load`.
    family: Of the model that is wanted.
  """
  if name == "emoji" or (pathlib.Path(name) / "model.json").is_file():
    return
  if family == "emoji":
    how = ("train it with train.tokenizer and train.ar, or take the embedded "
           "one with --config.checkpoint=emoji")
  else:
    file = f"configs/{_CONFIGS.get(family, family)}.py"
    how = (f"convert one with python -m infer.convert --config {file} "
           f"--source hf:ORG/NAME --out {name} (the names are in {file})")
  raise UserError(f"got no model in {name}, expected a model folder; {how}")


def write_extra(
    folder: str | os.PathLike, kind: str, cfg: Any, params: Params, dtype: Any
) -> None:
  """Writes spatial "heads" or a "drafter": what they fit, and their weights."""
  folder = pathlib.Path(folder)
  checkpoints.save(folder / "weights", params, dtype)
  checkpoints.write_json(folder / f"{kind}.json", dataclasses.asdict(cfg))


def read_extra(folder: str | os.PathLike, kind: str) -> tuple[Any, Params]:
  """(what they fit, weights) of a folder written by `write_extra`.

  Raises:
    UserError: when the folder holds none, or is damaged.
  """
  folder = pathlib.Path(folder)
  values = checkpoints.read_json(folder / f"{kind}.json")
  return (from_config_dict(_KINDS[kind], values),
          checkpoints.restore(folder / "weights"))
