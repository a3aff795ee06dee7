"""Prints the table of published models in docs/models.md.

    python docs/models_table.py

Memory is that of the networks and the cache of one image of the default size:
bfloat16 on an accelerator, float32 on a CPU, which also keeps what it has read.
A device is named if its memory is larger than that by a tenth.
"""

from ssd_jax.cli import model_list
from ssd_jax.pipeline.published_models import CATALOG

DEVICES = {"v5e": 16.9e9, "L4": 24e9, "v6e": 33.5e9, "A100, H100": 80e9,
           "v5p": 102.8e9, "H200": 141e9}
HEADER = ("| `--model` | billions of parameters | disk | memory, GPU or TPU | "
          "smallest device | memory, CPU | passes by `ar` |\n"
          "|---|---|---|---|---|---|---|")


def row(name, model):
  """Returns a model's row."""
  grid, preview = (getattr(model_list.family_of(model).generator, name)
                   for name in ("grid", "preview"))
  passes = f"{grid.num_tokens:,}"
  if preview is not None:
    passes = (f"{preview.num_tokens + grid.num_tokens:,} "
              f"({preview.num_tokens} + {grid.num_tokens:,})")
  needed = model_list.needed_bytes(model, "gpu")
  held = next((device for device, memory in DEVICES.items()
               if 1.1 * needed < memory), "none alone")
  gigabytes = [f"{x / 1e9:.1f} GB" for x in (
      model.stored_bytes, needed, model_list.needed_bytes(model, "cpu"))]
  count = (model.trunk + model.vq + model.text) / 1e9
  disk, accelerator, cpu = gigabytes
  return (f"| `{name}` | {count:.2f} | {disk} | {accelerator} | {held} | {cpu} "
          f"| {passes} |")


def table():
  """Returns the table."""
  return "\n".join([HEADER, *(row(*item) for item in CATALOG.items())])


if __name__ == "__main__":
  print(table())
