"""Runs notebooks and stores the pictures of their cells that keep outputs.

    python docs/notebooks.py colab/quickstart.ipynb

Needs the packages of the extra `test`. A cell that is tagged `keep_output`
keeps its picture, in few colours and an animation in few frames; of all other
outputs nothing is stored.
"""

import base64
import io
import pathlib
import sys
import tempfile

import nbclient
import nbformat
from PIL import Image, ImageSequence

from ssd_jax.visualization import contact_sheets

FRAMES, COLOURS = 32, 128


def main():
  """Runs each notebook that is named, and writes it again."""
  for name in sys.argv[1:]:
    path = pathlib.Path(name)
    notebook = nbformat.read(path, 4)
    ran = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as folder:
      resources = {"metadata": {"path": folder}}
      nbclient.NotebookClient(ran, timeout=1800, resources=resources).execute()
    for cell, done in zip(notebook.cells, ran.cells, strict=True):
      if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
        if "keep_output" in cell.metadata.get("tags", []):
          cell.outputs = list(map(kept, done.outputs))
      for output in done.get("outputs", []):
        print(output.get("text", ""), end="")
    nbformat.write(notebook, path)
    print(path, path.stat().st_size // 1000, "kB")


def kept(output):
  """The picture of an output, and nothing else."""
  [kind] = {"image/gif", "image/png"} & output.data.keys()
  image = Image.open(io.BytesIO(base64.b64decode(output.data[kind])))
  data = {kind: base64.b64encode(smaller(image)).decode()}
  return nbformat.v4.new_output("display_data", data)


def smaller(image):
  """Bytes of a picture in few colours; of an animation in few frames too."""
  frames = [x.convert("RGB") for x in ImageSequence.Iterator(image)]
  step = -(-len(frames) // FRAMES)
  times = [image.info.get("duration", 0) * step] * len(frames[:-1:step])
  frames = frames[:-1:step] + frames[-1:]
  sample = [frames[0], frames[len(frames) // 2], frames[-1]]
  colours = contact_sheets.abreast(sample).quantize(
      COLOURS, Image.Quantize.MAXCOVERAGE)
  frames = [x.quantize(palette=colours, dither=Image.Dither.NONE)
            for x in frames]
  file, more = io.BytesIO(), {}
  if image.format == "GIF":
    more = dict(save_all=True, append_images=frames[1:], loop=0,
                duration=[*times, 2000])
  frames[0].save(file, image.format, optimize=True, **more)
  return file.getvalue()


if __name__ == "__main__":
  main()
