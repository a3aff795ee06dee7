"""Prints the published models: `--model list`."""

import jax

from ssd_jax.core.protocols import Family
from ssd_jax.pipeline import model_folder, published_models
from ssd_jax.pipeline.published_models import Published
from ssd_jax.runtime import memory

_ROW = "{:<17} {:>8} {:>8} {:>8} {:>9}  {}"


def family_of(model: Published) -> Family:
  """Returns a published model's family, without its files."""
  config = model.config
  return model_folder.FAMILIES[config.family](
      {"config": config.to_dict()}, None)


def needed_bytes(model: Published, platform: str | None = None) -> int:
  """Returns the bytes of a model and of one image of its default size.

  Args:
    model: The model.
    platform: "cpu", "gpu" or "tpu"; None for the devices in use.
  """
  platform = platform or jax.default_backend()
  text = model.text * (4 if platform == "cpu" else 2)
  return text + model_folder.needed_bytes(
      family_of(model), model.trunk, model.vq, 2 * model.trunk, platform)


def show() -> None:
  """Prints size, memory and licence of each model, and which ones fit here."""
  free = memory.free_bytes()
  print(_ROW.format("name", "billions", "disk GB", "RAM GB", "fits here",
                    "licence of the weights"))
  for name, model in published_models.CATALOG.items():
    needed = needed_bytes(model)
    fits = "?" if free is None else "yes" if needed <= free else "no"
    print(_ROW.format(
        name, f"{(model.trunk + model.vq + model.text) / 1e9:.2f}",
        f"{model.stored_bytes / 1e9:.1f}", f"{needed / 1e9:.1f}", fits,
        model.licence))
  here = "unknown" if free is None else f"{free / 1e9:.1f} GB"
  print("RAM: the networks and one image of the default size on one device, "
        f"where free memory is {here}")
