"""Prints the published models: `--model list`."""

import numpy as np

from ssd_jax.pipeline import model_folder, published_models
from ssd_jax.runtime import memory

_ROW = "{:<17} {:>8} {:>8} {:>8} {:>9}  {}"


def show() -> None:
  """Prints size, memory and licence of each model, and which ones fit here."""
  free = memory.free_bytes()
  print(_ROW.format("name", "billions", "disk GB", "RAM GB", "fits here",
                    "licence of the weights"))
  for name, model in published_models.CATALOG.items():
    config = model.config
    family = model_folder.FAMILIES[config.family](
        {"config": config.to_dict()}, None)
    needed = model_folder.needed_bytes(
        family, model.trunk, model.vq, 2 * model.trunk)
    needed += model.text * np.dtype(family.generator.dtype).itemsize
    fits = "?" if free is None else "yes" if needed <= free else "no"
    print(_ROW.format(
        name, f"{(model.trunk + model.vq + model.text) / 1e9:.2f}",
        f"{model.stored_bytes / 1e9:.1f}", f"{needed / 1e9:.1f}", fits,
        model.licence))
  here = "unknown" if free is None else f"{free / 1e9:.1f} GB"
  print("RAM: the networks and one image of the default size on one device, "
        f"where free memory is {here}")
