"""Model folders: training and infer.convert write them, `load` reads them.

  DIR/model.json        the family and its settings
  DIR/trunk, DIR/vq     orbax checkpoints
  DIR/heads             spatial heads: heads.json and weights, if any
  DIR/drafter           a drafter: drafter.json and weights, if any
"""

from collections.abc import Callable, Container, Mapping, Sequence
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.core.config import UserError, check, from_config_dict
from ssd_jax.core.protocols import Family
from ssd_jax.core.types import Params
from ssd_jax.core.weights import leaves_by_path
from ssd_jax.families import (
  anole,
  emoji,
  emu3,
  emu3_5,
  glm_image,
  janus,
  liquid,
  llamagen,
  lumina,
  lumina2,
  simplear,
)
from ssd_jax.models.drafter import DrafterConfig, bind_drafter
from ssd_jax.models.quantization import quantize
from ssd_jax.models.spatial_heads import HeadsConfig, bind_heads
from ssd_jax.pipeline import image_prompts, published_models
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import memory, sharding
from ssd_jax.storage import checkpoints, model_settings
from ssd_jax.storage.files import read_json, user_path, write_json

EMBEDDED = pathlib.Path(__file__).parent.parent / "assets" / "emoji"
FAMILIES: dict[str, Callable[..., Family]] = {
    "anole": anole.from_settings,
    "emoji": lambda settings, folder: emoji.from_settings(settings),
    "emu3": emu3.from_settings,
    "emu3_5": emu3_5.from_settings,
    "glm_image": glm_image.from_settings,
    "janus": janus.from_settings,
    "liquid": liquid.from_settings,
    "llamagen": llamagen.from_settings,
    "lumina": lumina.from_settings,
    "lumina2": lumina2.from_settings,
    "simplear": simplear.from_settings,
}
_CONFIGS = {"janus": "janus_pro"}  # where the file has another name
CHOICES = {"emu3": emu3.CHOICES, "emu3_5": emu3_5.CHOICES,
           "glm_image": glm_image.CHOICES,
           "lumina": lumina.CHOICES, "lumina2": lumina2.CHOICES,
           "simplear": simplear.CHOICES}
_SAMPLING = ("guidance", "temperature", "top_k", "top_p")
_KINDS = {"heads": HeadsConfig, "drafter": DrafterConfig}


def load(
    name: str | os.PathLike = "emoji", *, random_weights: bool = False,
    heads: str | os.PathLike | None = None,
    drafter: str | os.PathLike | None = None,
    choices: Mapping[str, Any] | None = None, extras: bool = True,
    int8: bool = False, images: Sequence[image_prompts.Given] = (),
) -> Pipeline:
  """Loads a pipeline of a model folder or of a published model.

  Args:
    name: "emoji" (the embedded model), a folder written by training or
      infer.convert, or the name of a published model, such as "simplear", which
      is downloaded and converted once (`published_models.CATALOG`).
    random_weights: Use random parameters for the trunk; the model's own heads
      and drafter, which belong to its trunk, are left out.
    heads: Folder of spatial heads, instead of the model's own.
    drafter: Folder of a drafter, instead of the model's own.
    choices: What a family leaves open until it generates: the default sampling
      ("sampling.guidance" ...), lumina's size, emu3's ratio, suffix, negative.
    extras: Whether the model's own heads and drafter are read.
    int8: Keep the matrices of trunk and heads in int8; see models/int8.py.
    images: Images that prompts will contain, which are checked before weights
      are read. A single one gives generated images its size, unless `choices`
      do.

  Raises:
    UserError: if the folder is not a model, is damaged, or its parts do not
      belong together, if memory is too small, if int8 is impossible here, or if
      the family does not read such images.
  """
  _check_names(name=name, heads=heads, drafter=drafter)
  check_images(name, images)
  name = published_models.resolve(name)
  check(choices is None or isinstance(choices, Mapping), "choices", choices,
        "a dict of settings")
  folder, settings = _folder_of(name), read_settings(name)
  family, shapes = _family(
      folder, settings, choices or {}, images, random_weights)
  if random_weights:
    params = random_params(family)
  else:
    params = {"trunk": _restore(folder / "trunk", shapes["trunk"])}
  found = {"heads": heads, "drafter": drafter}
  for kind in found:
    if extras and (folder / kind).is_dir() and not random_weights:
      found[kind] = found[kind] or folder / kind
  vq_params = (
      _restore(folder / "vq", shapes["vq"]) if _has_pixels(family) else None)
  _check_tokenizer(folder, settings)
  found["model"] = folder
  return _pipeline(family, params, vq_params, found, int8)


def _family(
    folder: pathlib.Path, settings: dict[str, Any], choices: Mapping[str, Any],
    images: Sequence[image_prompts.Given], random_weights: bool,
) -> tuple[Family, dict[str, Any]]:
  """Returns a folder's family, and the shapes of its parameters.

  Raises:
    UserError: if settings are damaged, memory is too small, or the family does
      not read such images.
  """
  try:
    family = FAMILIES[settings["family"]](settings, folder)
    choose(settings, image_prompts.output_choices(family, images) | {**choices})
    family = FAMILIES[settings["family"]](settings, folder)
    for key in _SAMPLING:
      _ = family.sampling[key]
    shapes = _shapes(family)
    _check_memory(family, shapes, None if random_weights else folder)
  except UserError:
    raise
  except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
          MemoryError) as error:  # of settings that were changed
    raise UserError(
        f"Expected all settings in {folder / 'model.json'}, got it without "
        f"{error}. Write the model again."
    ) from error
  return family, shapes


def check_images(
    name: str | os.PathLike, images: Sequence[image_prompts.Given]
) -> None:
  """Raises UserError for images that a published model does not read.

  It may not be downloaded yet; of others nothing is checked here.

  Args:
    name: As for `load`.
    images: Images that prompts will contain.
  """
  known = published_models.find(name) if image_prompts.count(images) else None
  if known is not None:
    for_images(published_models.CATALOG[known].config, images)


def for_images(
    config: ml_collections.ConfigDict, images: Sequence[image_prompts.Given],
    fixed: Container[str] = (),
) -> ml_collections.ConfigDict:
  """Returns a family's settings for prompts that contain images.

  Args:
    config: Settings of configs/NAME.py.
    images: Images that prompts will contain.
    fixed: Settings that a single image's size does not change.

  Raises:
    UserError: if the family does not read such images.
  """
  if not image_prompts.count(images):
    return config
  family = FAMILIES[config.family]({"config": config.to_dict()}, None)
  found = image_prompts.output_choices(family, images)
  config = config.copy_and_resolve_references()
  config.update({key: found[key] for key in found if key not in fixed})
  return config


def _restore(folder: pathlib.Path, shapes: Any) -> Params:
  """Returns the parameters of a folder, which have to have these shapes."""
  params = checkpoints.restore(folder)
  checkpoints.check_shapes(folder, params, shapes)
  return params


def _folder_of(name: str | os.PathLike) -> pathlib.Path:
  return EMBEDDED if name == "emoji" else user_path(name)


def read_settings(name: str | os.PathLike) -> dict[str, Any]:
  """Returns what the model.json of a model folder holds.

  Args:
    name: As for `load`.

  Raises:
    UserError: if it is damaged or of no known family.
  """
  file = _folder_of(name) / "model.json"
  settings = model_settings.read(file)
  known = settings.get("family")
  if not isinstance(known, str) or known not in FAMILIES:
    raise UserError(
        f"Expected one of {sorted(FAMILIES)}, got {file} without a known "
        "family. Check the folder.")
  return settings


def identity(name: str | os.PathLike) -> dict[str, str]:
  """Returns identifiers of the parts that make image tokens of prompts.

  Args:
    name: As for `load`. Folders without checksums have fewer identifiers.
  """
  folder, found = _folder_of(name), {}
  for part in ("trunk", "text_encoder"):
    if (folder / part / checkpoints.CHECKSUMS).is_file():
      found[part.replace("_", " ")] = checkpoints.identity(folder / part)
  texts = sorted(file for file in (folder / "tokenizer").rglob("*")
                 if file.is_file())
  made = hashlib.sha256(str(read_settings(name).get("words", "")).encode(
      "utf-8", "surrogatepass"))
  for file in texts:
    made.update(file.name.encode() + file.read_bytes())
  return found | {"text tokenizer": made.hexdigest()[:16]}


def _check_names(**places: Any) -> None:
  for key, value in places.items():
    is_open = value is None and key != "name"
    check(is_open or isinstance(value, (str, os.PathLike)), key, repr(value),
          "the name of a folder")


def from_config(
    config: ml_collections.ConfigDict,
    heads: str | os.PathLike | None = None,
    drafter: str | os.PathLike | None = None, int8: bool = False,
) -> Pipeline:
  """Returns a pipeline of a published family with random weights.

  Args:
    config: Settings of configs/NAME.py.
    heads: Folder of spatial heads, if any.
    drafter: Folder of a drafter, if any.
    int8: As for `load`.

  Raises:
    UserError: if a setting is wrong or memory is too small.
  """
  family = FAMILIES[config.family]({"config": config.to_dict()}, None)
  _check_memory(family, _shapes(family), None)
  vq_params = None
  if _has_pixels(family):
    vq_params = jax.jit(_init_vq, static_argnums=0)(family)
  return _pipeline(family, random_params(family), vq_params,
                   {"heads": heads, "drafter": drafter}, int8)


def _check_tokenizer(folder: pathlib.Path, settings: dict[str, Any]) -> None:
  """Raises UserError if the trunk belongs to another image tokenizer."""
  known = settings.get("tokenizer")
  if known is not None and known != checkpoints.identity(folder / "vq"):
    raise UserError(
        "Expected the image tokenizer that the trunk was trained with, got one "
        f"in {folder / 'vq'} that was changed afterwards. Put it back, or "
        "train the trunk again.")


def _has_pixels(family: Family) -> bool:
  """Returns whether image tokens are codes of pixels."""
  return "vq" in family.config


def _init_vq(family: Family) -> Params:
  size = family.vq.cfg.downsample
  picture = jnp.zeros((1, size, size, 3))
  return family.vq.init(jax.random.key(1), picture)["params"]


def _shapes(family: Family) -> Params:
  """Returns the shapes of {"trunk": ..., "vq": ...}."""
  trunk = jax.eval_shape(family.generator.init, jax.random.key(0))
  if not _has_pixels(family):
    return trunk | {"vq": {}}
  return trunk | {"vq": jax.eval_shape(lambda: _init_vq(family))}


def random_params(family: Family) -> Params:
  """Returns {"trunk": random parameters} in the dtype of inference.

  Arrays are made one by one, the largest first: sampling an array briefly takes
  up to four times its memory in float32.
  """
  init = lambda key: leaves_by_path(
    family.generator.init(key)["trunk"], "trunk"
  )

  def make(path, key):
    return {path: init(key)[path].astype(_dtype())}

  key, made = jax.random.key(0), dict[str, jax.Array]()
  shapes = jax.eval_shape(init, key)
  for path in sorted(shapes, key=lambda path: -math.prod(shapes[path].shape)):
    made |= sharding.create(jax.jit(functools.partial(make, path)), key)
  return traverse_util.unflatten_dict(made, sep="/")


def _pipeline(
    family: Family, params: Params, vq_params: Params, found: dict[str, Any],
    int8: bool,
) -> Pipeline:
  """Assembles a pipeline; `found` holds folders by kind, or None."""
  generator, extras = family.generator, {}
  folders = {k: user_path(v) for k, v in found.items() if v is not None}
  for kind in folders.keys() & _KINDS:
    extras[kind], params[kind] = read_extra(folders[kind], kind)
  params = checkpoints.cast(params, _dtype())
  model = generator.model()
  if "heads" in extras:
    model = bind_heads(generator, extras["heads"], params)
  if "drafter" in extras:
    model = bind_drafter(generator, model, extras["drafter"], params)
  if int8:  # last, since binding heads compares weights
    params |= quantize({k: params[k] for k in params.keys() - {"drafter"}})
  if vq_params is not None:
    vq_params = checkpoints.cast(vq_params, jnp.float32)
  return Pipeline(family, params, vq_params, model, folders)


def _dtype(platform: str | None = None) -> Any:
  platform = platform or jax.default_backend()
  return jnp.float32 if platform == "cpu" else jnp.bfloat16


def choose(settings: dict[str, Any], choices: Mapping[str, Any]) -> None:
  """Writes choices into the settings of a model.json."""
  family, config = settings["family"], settings["config"]
  open_ = ("sampling", *CHOICES.get(family, ()))
  for key, value in choices.items():
    top, *rest = key.split(".")
    if top not in open_ and top != "checkpoint":  # the folder itself
      raise UserError(
          f"Expected only {', '.join(open_)}, got --config.{key} for a made "
          f"model of {family}. Leave it out, or make the model anew.")
    names = rest or (value if isinstance(value, Mapping) else [value])
    unknown = [x for x in names if top == "sampling" and x not in config[top]]
    if unknown:
      raise UserError(
          f"Expected only {', '.join(config[top])}, got {unknown[0]!r} in "
          "sampling.")
    if top in open_ and rest:
      config[top][rest[0]] = value
    elif top in open_:
      config[top] = value


def _check_memory(
    family: Family, shapes: Params, folder: pathlib.Path | None
) -> None:
  """Raises UserError if a model and the cache of one image do not fit.

  Args:
    family: The model's family.
    shapes: Shapes of its arrays.
    folder: The model's folder; None for random weights.
  """
  free = memory.free_bytes()
  counts = [math.prod(x.shape) for x in jax.tree.leaves(shapes["trunk"])]
  trunk, vq = sum(counts), sum(
      math.prod(x.shape) for x in jax.tree.leaves(shapes["vq"]))
  stored = None if folder is None else sum(
      file.stat().st_size for file in (folder / "trunk").rglob("*"))
  needed = needed_bytes(family, trunk, vq, stored)
  if folder is None:  # the largest array while it is drawn
    needed = max(needed, 4 * 4 * max(counts) // sharding.num_param_shards())
  if free is not None and needed > free:
    raise UserError(
        f"Expected at most the {free / 1e9:.1f} GB of free memory, got a "
        f"trunk of {trunk / 1e9:.1f} billion parameters, which needs "
        f"{needed / 1e9:.1f} GB for one image in {np.dtype(_dtype())}. "
        "Choose a smaller model or a larger machine, or share it by --mesh "
        "tensor=8.")


def needed_bytes(
    family: Family, trunk: int, vq: int, stored: int | None,
    platform: str | None = None,
) -> int:
  """Returns the bytes per device of a model and the cache of one image.

  Args:
    family: The model's family.
    trunk: Number of the trunk's parameters.
    vq: Number of the image tokenizer's parameters.
    stored: Bytes of the trunk on disk; None for random weights.
    platform: "cpu", "gpu" or "tpu"; None for the devices in use.
  """
  platform = platform or jax.default_backend()
  size = np.dtype(_dtype(platform)).itemsize
  needed = (trunk + _cached(family)) * size // sharding.num_param_shards()
  needed += 4 * vq  # float32
  if stored is not None and platform == "cpu":
    needed += stored  # what was read, until it is cast
  return needed


def _cached(family: Family) -> int:
  """Returns the cache elements of one image, its prompt's left out."""
  cfg, generator = family.generator.cfg, family.generator
  slots = generator.grid.length
  slots += generator.preview.length if generator.preview else 0
  streams = 1 + (family.sampling["guidance"] != 1.0)
  return (2 * cfg.n_layers * streams * cfg.n_kv_heads * slots
          * cfg.head_dim)


def require(name: str | os.PathLike, family: str) -> None:
  """Raises UserError, which says how to make a model, unless there is one.

  Args:
    name: As for `load`.
    family: The family of the model.
  """
  if name == "emoji" or (user_path(name) / "model.json").is_file():
    return
  if family == "emoji":
    how = ("Train it with train.tokenizer and train.ar, or take the embedded "
           "one with --config.checkpoint=emoji")
  else:
    file = f"configs/{_CONFIGS.get(family, family)}.py"
    how = (f"Convert one with python -m infer.convert --config {file} "
           f"--source hf:ORG/NAME --out {name} (the names are in {file})")
  raise UserError(f"Expected a model folder, got no model in {name}. {how}.")


def write_extra(
    folder: str | os.PathLike, kind: str, cfg: Any, params: Params, dtype: Any
) -> None:
  """Writes spatial "heads" or a "drafter": their configuration and weights."""
  folder = user_path(folder)
  checkpoints.save(folder / "weights", params, dtype)
  write_json(folder / f"{kind}.json", dataclasses.asdict(cfg))


def read_extra(folder: str | os.PathLike, kind: str) -> tuple[Any, Params]:
  """Returns (configuration, weights) of a folder written by `write_extra`.

  Raises:
    UserError: if the folder holds none, or is damaged.
  """
  folder = user_path(folder)
  values = read_json(folder / f"{kind}.json", dict)
  return (from_config_dict(_KINDS[kind], values),
          checkpoints.restore(folder / "weights"))
