"""The files that official benchmarks give to generators and take from them.

Nothing is downloaded: prompt files are read from disk, images are laid out in
folders as the official scorers read them.
"""

from collections.abc import Sequence
import csv
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
from PIL import Image

from ssd_jax.core.config import UserError, check
from ssd_jax.core.images import Images
from ssd_jax.storage.files import write_text
from ssd_jax.visualization.contact_sheets import save_picture

LAYOUTS = ("geneval", "dpg")
_DPG_PICTURES = 4  # of a prompt, in a grid of two by two


@dataclasses.dataclass(frozen=True)
class Item:
  """A prompt of a benchmark.

  Attributes:
    prompt: The text.
    name: What the benchmark calls it.
    metadata: What GenEval's scorer needs, else empty.
  """

  prompt: str
  name: str
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_prompts(path: str | os.PathLike) -> list[Item]:
  """The prompts of a file or folder, in its order.

  Text files hold one prompt per line. A folder of .txt files is DPG-Bench's,
  .jsonl GenEval's, .json COCO's captions (the first of each image), .tsv
  PartiPrompts'.

  Raises:
    UserError: when it cannot be read, is none of these or holds no prompt.
  """
  path = pathlib.Path(path)
  readers = {".jsonl": _geneval, ".json": _coco, ".tsv": _parti}
  reader = _dpg if path.is_dir() else readers.get(path.suffix.lower(), _lines)
  try:
    items = reader(path)
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
        "Expected UTF-8 text with one prompt per line, got an unreadable "
        f"--prompts_file {path}. Check the path."
    ) from error
  except (ValueError, KeyError, TypeError, AttributeError,
          RecursionError) as error:
    raise UserError(
        "Expected the official prompt file that its name says "
        f"({type(error).__name__}: {str(error)[:80]}), got {path}. Check the "
        "file."
    ) from error
  if not items:
    raise UserError(
        f"Expected at least one, got no prompt in {path}. Check the file.")
  return items


def _lines(path: pathlib.Path) -> list[Item]:
  lines = _read_lines(path)
  return [Item(line, f"{i:05d}") for i, line in enumerate(lines)
          if line.strip()]


def _geneval(path: pathlib.Path) -> list[Item]:
  """`evaluation_metadata.jsonl`; the line number names the folder."""
  rows = [json.loads(line) for line in _read_lines(path) if line.strip()]
  for number, row in enumerate(rows, 1):
    if not isinstance(row["prompt"], str):
      raise ValueError(f"entry {number} has no text as its prompt")
  return [Item(row["prompt"], f"{i:05d}", row) for i, row in enumerate(rows)]


def _read_lines(path: pathlib.Path) -> list[str]:
  """Lines of a file, which may begin with the mark that Windows puts there."""
  return path.read_text("utf-8-sig").split("\n")


def _dpg(path: pathlib.Path) -> list[Item]:
  """The folder `prompts`: one file per prompt, named by its id."""
  def order(file):
    return (not file.stem.isdigit(), file.stem.zfill(12))

  files = sorted(path.glob("*.txt"), key=order)
  return [Item(file.read_text("utf-8-sig").strip(), file.stem)
          for file in files]


def _coco(path: pathlib.Path) -> list[Item]:
  """`captions_val2014.json`: the first caption of each image."""
  first: dict[int, str] = {}
  for row in sorted(json.loads(path.read_text("utf-8-sig"))["annotations"],
                    key=lambda row: row["id"]):
    first.setdefault(row["image_id"], row["caption"].strip())
  return [Item(text, f"{image:012d}") for image, text in sorted(first.items())]


def _parti(path: pathlib.Path) -> list[Item]:
  """`PartiPrompts.tsv`, whose first column is headed Prompt."""
  with path.open(encoding="utf-8-sig", newline="") as file:
    rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [Item(row["Prompt"].strip(), f"{i:05d}")
            for i, row in enumerate(rows)]


def export(
    layout: str, folder: pathlib.Path, items: Sequence[Item],
    images: Images,
) -> None:
  """Writes images as an official scorer reads them.

  What an earlier export left for other prompts is removed: the scorers take all
  that they find.

  Args:
    layout: "geneval": 00000/metadata.jsonl, 00000/samples/0000.png and so on;
      "dpg": one PNG per prompt, named by its id, of four images in a grid.
    folder: Made where it is missing.
    items: Prompts with what the benchmark says of them.
    images: uint8 [H, W, 3] each, equally many for each prompt, in its order.

  Raises:
    UserError: when the prompts are not that benchmark's, or images are
      missing.
  """
  check(layout in LAYOUTS, "export", layout, f"one of {', '.join(LAYOUTS)}")
  count = len(images) // len(items)
  check_exportable(layout, items, count)
  _remove_others(layout, folder, [item.name for item in items])
  for number, item in enumerate(items):
    pictures = images[number * count:(number + 1) * count]
    if layout == "geneval":
      _export_geneval(folder / item.name, item, pictures)
    else:
      save_picture(_grid(pictures), folder / f"{item.name}.png")


def _remove_others(
    layout: str, folder: pathlib.Path, names: Sequence[str]
) -> None:
  """Removes exported prompts, and samples of GenEval's, of an older export."""
  if layout == "geneval":
    for path in folder.glob("[0-9]" * 5):
      shutil.rmtree(path)
  else:
    for path in folder.glob("*.png"):
      if path.stem not in names:
        path.unlink()


def check_exportable(layout: str, items: Sequence[Item], pictures: int) -> None:
  """Raises UserError unless prompts and numbers suit the scorer."""
  check(pictures >= 1, "num_images", pictures, ">= 1")
  if layout == "geneval":
    lacks = [item for item in items if "tag" not in item.metadata]
    if lacks:
      raise UserError(
          f"Expected GenEval's own, got the prompt {lacks[0].prompt[:40]!r} "
          "for --export geneval. Give its evaluation_metadata.jsonl as "
          "--prompts_file.")
  elif pictures != _DPG_PICTURES:
    raise UserError(
        f"Expected {_DPG_PICTURES}, got {pictures} images per prompt for "
        f"--export dpg. Add --num_images {_DPG_PICTURES}.")


def _export_geneval(folder: pathlib.Path, item: Item, pictures) -> None:
  for number, image in enumerate(pictures):
    save_picture(
        Image.fromarray(image), folder / "samples" / f"{number:04d}.png")
  write_text(folder / "metadata.jsonl", json.dumps(item.metadata))


def _grid(pictures: Images) -> Image.Image:
  """Four images, row by row, without a margin: the scorer cuts them apart."""
  rows = [np.concatenate(pictures[i:i + 2], axis=1) for i in (0, 2)]
  return Image.fromarray(np.concatenate(rows))
