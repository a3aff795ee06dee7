"""Plots the diagrams of docs/decoders.md from traces of the embedded model.

    python docs/diagrams.py

Writes docs/order.png, the pass in which each token became final, and
docs/race.gif, AR beside a decoder, pass by pass.
"""

import pathlib

import ssd_jax
from ssd_jax.decoding import registry
from ssd_jax.visualization import animations, contact_sheets

PROMPT, SEED = "red heart", 0
LABELS = ("ar", "sjd", "zipar", "pjd", "exact", "stair")
HEADS = ("mtp", "ssd")  # used if the model has heads
RACER = "exact"
FOLDER = pathlib.Path(__file__).parent


def main():
  """Generates with every decoder, then writes both files."""
  pipe = ssd_jax.load("emoji")
  labels = LABELS + (HEADS if min(pipe.model.heads) else ())
  outputs, columns = {}, []
  for label in labels:
    out = pipe.generate([PROMPT], registry.parse(label), seed=SEED, trace=True)
    outputs[label] = out
    size = tuple(3 * x // 2 for x in out.images.shape[1:3])
    heat = animations.heat_map(out.commit_pass[0], size)
    head = contact_sheets.caption(
      heat.width, [label, f"{out.passes[0]} passes"]
    )
    columns.append(contact_sheets.stack([head, heat]))
    print(label, int(out.passes[0]), "passes")
  half = (len(columns) + 1) // 2
  rows = [
    contact_sheets.abreast(columns[:half]),
    contact_sheets.abreast(columns[half:]),
  ]
  contact_sheets.save_picture(
    contact_sheets.stack(rows, 8), FOLDER / "order.png"
  )
  fillings = [
      animations.filling(pipe, outputs[label], 0, label)
      for label in ("ar", RACER)]
  animations.save_animation(animations.animation(fillings), FOLDER / "race.gif")


if __name__ == "__main__":
  main()
