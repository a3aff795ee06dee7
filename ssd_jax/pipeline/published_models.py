"""Published models by name: where they are, and what becomes of them once.

A model that is named is downloaded and converted into the user's cache the
first time, as `infer.convert` would; an interrupted download or conversion goes
on where it stopped.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
import pathlib

from absl import logging
import ml_collections

from ssd_jax.convert import convert, hub, registry
from ssd_jax.convert.recipes import Recipe
from ssd_jax.core.config import UserError
from ssd_jax.families import (
  anole,
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
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage import files

_DTYPE = "bfloat16"  # of trunks and text encoders in the cache
_CHAMELEON = "hf:GAIR/Anole-7b-v0.1"  # ungated, with Meta's image tokenizer
_RESEARCH = "Chameleon Research License"
_DEEPSEEK = "DeepSeek Model License"


@dataclasses.dataclass(frozen=True)
class Published:
  """A published model.

  Attributes:
    get_config: Its family's settings of a variant.
    variant: The variant.
    places: Location of each part, by the flags of infer.convert.
    trunk: Parameters of the trunk as it is converted.
    vq: Parameters of the image tokenizer.
    licence: Licence of the weights, in a few words (docs/models.md).
    text: Parameters of the text encoder, if there is one.
  """

  get_config: Callable[[str], ml_collections.ConfigDict]
  variant: str
  places: Mapping[str, str]
  trunk: int
  vq: int
  licence: str
  text: int = 0

  @property
  def config(self) -> ml_collections.ConfigDict:
    """Its settings."""
    return self.get_config(self.variant)

  @property
  def stored_bytes(self) -> int:
    """Size of the converted model."""
    return 2 * (self.trunk + self.text) + 4 * self.vq


def _simplear(size: str, trunk: int) -> Published:
  # Qwen2.5's tokenizer spells as SimpleAR's does.
  places = {"source": f"hf:Daniel0724/SimpleAR-{size}-RL",
            "vq": "hf:nvidia/Cosmos-1.0-Tokenizer-DV8x16x16",
            "tokenizer": f"hf:Qwen/Qwen2.5-{size}-Instruct"}
  return Published(simplear.get_config, size.lower(), places, trunk,
                   82_298_774, "unmarked; tokenizer NVIDIA Open Model")


def _llamagen(variant: str, trunk: int) -> Published:
  if variant.startswith("c2i"):
    places = {"source": "hf:FoundationVision/LlamaGen"}
    return Published(
        llamagen.get_config, variant, places, trunk, 71_883_403, "MIT")
  places = {"source": "hf:peizesun/llamagen_t2i",
            "text_encoder": "hf:google/flan-t5-xl"}
  return Published(llamagen.get_config, variant, places, trunk, 71_883_403,
                   "MIT", 1_223_527_424)


def _lumina(side: str) -> Published:
  name = "hf:Alpha-VLLM/Lumina-mGPT-7B-"
  places = {"source": name + side, "vq": _CHAMELEON, "tokenizer": name + "768"}
  return Published(lumina.get_config, side, places, 6_778_785_792, 68_718_467,
                   _RESEARCH)


CATALOG: Mapping[str, Published] = {
    "simplear": _simplear("0.5B", 608_484_224),
    "simplear-1.5b": _simplear("1.5B", 1_739_916_800),
    "llamagen-b": _llamagen("c2i_B_256", 110_888_448),
    "llamagen-l": _llamagen("c2i_L_256", 342_910_976),
    "llamagen-xl": _llamagen("c2i_XL_384", 774_699_520),
    "llamagen-xxl": _llamagen("c2i_XXL_384", 1_410_972_672),
    "llamagen-3b": _llamagen("c2i_3B_384", 3_096_659_200),
    "llamagen-t2i-256": _llamagen("t2i_XL_256", 777_923_840),
    "llamagen-t2i-512": _llamagen("t2i_XL_512", 777_923_840),
    "janus-pro-1b": Published(
        janus.get_config, "1b", {"source": "hf:deepseek-ai/Janus-Pro-1B"},
        1_514_262_528, 71_883_403, _DEEPSEEK),
    "janus-pro-7b": Published(
        janus.get_config, "7b", {"source": "hf:deepseek-ai/Janus-Pro-7B"},
        6_641_950_720, 71_883_403, _DEEPSEEK),
    "anole": Published(
        anole.get_config, "native", {"source": "hf:GAIR/Anole-7b-v0.1"},
        6_778_785_792, 68_718_467, _RESEARCH),
    "lumina-512": _lumina("512"),
    "lumina-768": _lumina("768"),
    "lumina-1024": _lumina("1024"),
    "lumina2": Published(
        lumina2.get_config, "768",
        {"source": "hf:Alpha-VLLM/Lumina-mGPT-2.0",
         "vq": "hf:ai-forever/MoVQGAN"},
        7_245_897_728, 270_669_103, "Apache-2.0; tokenizer unmarked"),
    "emu3": Published(
        emu3.get_config, "1:1",
        {"source": "hf:BAAI/Emu3-Gen", "vq": "hf:BAAI/Emu3-VisionTokenizer"},
        7_870_017_536, 270_736_771, "Apache-2.0"),
    "glm-image": Published(
        glm_image.get_config, "", {"source": "hf:zai-org/GLM-Image"},
        8_914_264_064, 0, "MIT"),
    "liquid": Published(
        liquid.get_config, "7b",
        {"source": "hf:Junfeng5/Liquid_V1_7B", "vq": _CHAMELEON},
        8_588_012_544, 68_718_467, f"Gemma terms; {_RESEARCH}"),
    "emu3.5-image": Published(
        emu3_5.get_config, "4:3",
        {"source": "hf:BAAI/Emu3.5-Image",
         "vq": "hf:BAAI/Emu3.5-VisionTokenizer"},
        33_325_968_384, 455_336_963, "Apache-2.0"),
}


def find(name: str | os.PathLike) -> str | None:
  """Returns the name in CATALOG of a model, None for a folder.

  Args:
    name: A name, hf:ORG/NAME of a published trunk, or a folder. A model folder
      of the name of a published model is the folder.

  Raises:
    UserError: The repository is not one of CATALOG's.
  """
  text = os.fspath(name)
  if text.startswith(hub.PREFIX):
    named = [known for known, model in CATALOG.items()
             if model.places["source"] == text]
    if not named:
      raise UserError(
          f"Expected the hf:ORG/NAME of a model that --model list shows, got "
          f"{text}. Convert it with infer.convert.")
    return named[0]
  is_folder = (files.user_path(text) / "model.json").is_file()
  return text if text in CATALOG and not is_folder else None


def resolve(name: str | os.PathLike) -> str | os.PathLike:
  """Returns the folder of a model, downloaded and converted if it is missing.

  Args:
    name: As for `find`; what is not published is returned unchanged.

  Raises:
    UserError: Files are missing, damaged or out of reach, or there is no cache
      folder or disk space.
  """
  known = find(name)
  if known is None:
    return name
  cache = files.cache_folder()
  if cache is None:
    raise UserError(
        "Expected a cache folder that can be written for converted models, got "
        "none. Set XDG_CACHE_HOME.")
  folder = cache / "models" / known
  if not (folder / "model.json").is_file():
    make(CATALOG[known], folder, f"converting {known}")
  return folder


def make(model: Published, folder: pathlib.Path, label: str) -> None:
  """Downloads and converts a published model into a new folder.

  Args:
    model: The model.
    folder: The folder.
    label: Label of the progress bar.
  """
  recipe: Recipe = registry.recipe_of(model.config)
  places = {flag: hub.Location(at) for flag, at in model.places.items()}
  job = convert.open_job(recipe, registry.fetched(recipe, places), _DTYPE)
  folder.parent.mkdir(parents=True, exist_ok=True)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # orbax warns of empty checkpoints
  try:
    with Bar(total=job.size, unit="B", unit_scale=True, desc=label) as bar:
      convert.convert(job, folder, bar.update)
  finally:
    logging.set_verbosity(verbosity)
