"""Prompt files of official benchmarks, and folders for their scorers.

Nothing is downloaded: prompt files are read from disk, and images are written
in the folder layouts that the official scorers read.
"""

from collections.abc import Sequence
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
from ssd_jax.data import tables
from ssd_jax.storage.files import write_text
from ssd_jax.visualization.contact_sheets import save_picture

LAYOUTS = ("geneval", "dpg")
_COLUMNS = ("prompt", "caption", "text")
_DPG_PICTURES = 4  # images per prompt, in a two-by-two grid


@dataclasses.dataclass(frozen=True)
class Item:
  """A prompt of a benchmark.

  Attributes:
    prompt: The text.
    name: The benchmark's name of the prompt.
    metadata: Data for GenEval's scorer; empty for other benchmarks.
  """

  prompt: str
  name: str
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_prompts(path: str | os.PathLike) -> list[Item]:
  """Returns the prompts of a file or folder, in order.

  Text files hold one prompt per line. Other formats are .csv and .tsv (as
  PartiPrompts) with a header and a column of prompts, .jsonl (GenEval, or a
  text on each line), .json (COCO captions, the first of each image, or a list
  of texts) and a folder of .txt files (DPG-Bench).

  Raises:
    UserError: if the file is unreadable, of another format or without prompts.
  """
  path = pathlib.Path(path)
  readers = {".jsonl": _geneval, ".json": _coco, ".tsv": _table, ".csv": _table}
  reader = _dpg if path.is_dir() else readers.get(path.suffix.lower(), _lines)
  try:
    tables.refuse_pointer(path)
    items = reader(path)
  except UserError:
    raise
  except OSError as error:
    raise UserError(
        "Expected text with one prompt per line, got an unreadable "
        f"--prompts_file {path} ({error.strerror}). Check the path."
    ) from error
  except UnicodeDecodeError as error:
    raise UserError(
        f"Expected UTF-8 text, got {path}, which is not UTF-8 ({error.reason} "
        f"at byte {error.start}). Save it as UTF-8."
    ) from error
  except (ValueError, KeyError, TypeError, AttributeError,
          RecursionError) as error:
    raise UserError(
        "Expected an official prompt file of the format that its name implies, "
        f"got {path} ({type(error).__name__}: {str(error)[:80]}). Check the "
        "file."
    ) from error
  if not items:
    raise UserError(
        f"Expected at least one prompt, got no prompt in {path}. Check the "
        "file.")
  for item in items:
    tables.check_text(item.prompt, f"{path}, prompt {item.name}")
  return items


def _lines(path: pathlib.Path) -> list[Item]:
  lines = _read_lines(path)
  return [Item(line, f"{i:05d}") for i, line in enumerate(lines)
          if line.strip()]


def _geneval(path: pathlib.Path) -> list[Item]:
  """Reads `evaluation_metadata.jsonl`; line numbers name the folders."""
  rows = [json.loads(line) for line in _read_lines(path) if line.strip()]
  return _items(rows)


def _items(rows: list[Any]) -> list[Item]:
  """Returns prompts that are texts, or objects with a text as "prompt"."""
  items = []
  for number, row in enumerate(rows):
    data = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
      raise ValueError(f'entry {number + 1} has no text as its "prompt"')
    items.append(Item(data["prompt"], f"{number:05d}", data))
  return items


def _table(path: pathlib.Path) -> list[Item]:
  """Reads the column of prompts; quotation marks of .tsv are part of them."""
  rows = tables.read(path, _COLUMNS, path.suffix.lower() == ".csv")
  items = []
  for number, row in enumerate(rows):
    text = row.text(_COLUMNS)
    if text is None or not text.strip():
      raise UserError(
          f"Expected a header with a column {', '.join(_COLUMNS)}, and a text "
          f"there in every row, got none in {row.where}. Name it so, or save "
          "one prompt per line as .txt.")
    items.append(Item(text.strip(), f"{number:05d}"))
  return items


def _read_lines(path: pathlib.Path) -> list[str]:
  """Returns the lines of a file, without a byte-order mark of Windows."""
  return path.read_text("utf-8-sig").split("\n")


def _dpg(path: pathlib.Path) -> list[Item]:
  """Reads the folder `prompts`, which holds one file per prompt id."""
  def order(file):
    return (not file.stem.isdigit(), file.stem.zfill(12))

  files = sorted(
      (file for file in path.iterdir() if file.suffix.lower() == ".txt"
       and not file.name.startswith(".")), key=order)
  items = [Item(file.read_text("utf-8-sig").strip(), file.stem)
           for file in files]
  empty = [file for file, item in zip(files, items) if not item.prompt]
  if empty:
    raise UserError(
        f"Expected a prompt in every file, got none in {empty[0]}. Remove it.")
  return items


def _coco(path: pathlib.Path) -> list[Item]:
  """Reads the first caption of each image of `captions_val2014.json`.

  A file that is a list holds the prompts themselves.
  """
  found = json.loads(path.read_text("utf-8-sig"))
  if isinstance(found, list):
    return _items(found)
  if not isinstance(found, dict) or "annotations" not in found:
    raise ValueError('it is neither a list nor has it "annotations"')
  first: dict[int, str] = {}
  for row in sorted(found["annotations"], key=lambda row: row["id"]):
    first.setdefault(row["image_id"], row["caption"].strip())
  return [Item(text, f"{image:012d}") for image, text in sorted(first.items())]


def export(
    layout: str, folder: pathlib.Path, items: Sequence[Item],
    images: Images,
) -> None:
  """Writes images in the layout of an official scorer.

  Files of an earlier export for other prompts are removed, because the scorers
  read everything that they find.

  Args:
    layout: "geneval": 00000/metadata.jsonl, 00000/samples/0000.png and so on;
      "dpg": one PNG per prompt, named by its id, with four images in a grid.
    folder: Output folder; created if missing.
    items: Prompts with the benchmark's metadata.
    images: uint8 [H, W, 3] each, in the order of the prompts, equally many per
      prompt.

  Raises:
    UserError: if the prompts are not the benchmark's or images are missing.
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
  """Removes the prompts and GenEval samples of an earlier export."""
  if layout == "geneval":
    for path in folder.glob("[0-9]" * 5):
      shutil.rmtree(path)
  else:
    for path in folder.glob("*.png"):
      if path.stem not in names:
        path.unlink()


def check_exportable(layout: str, items: Sequence[Item], pictures: int) -> None:
  """Raises UserError if the scorer cannot take these prompts and images.

  Args:
    layout: Name of the layout.
    items: Prompts.
    pictures: Images per prompt.
  """
  check(pictures >= 1, "num_images", pictures, ">= 1")
  if layout == "geneval":
    lacks = [item for item in items if "tag" not in item.metadata]
    if lacks:
      raise UserError(
          "Expected GenEval's own prompts, got the prompt "
          f"{lacks[0].prompt[:40]!r} for --export geneval. Pass GenEval's "
          "evaluation_metadata.jsonl as --prompts_file.")
  elif pictures != _DPG_PICTURES:
    raise UserError(
        f"Expected {_DPG_PICTURES} images per prompt, got {pictures} images "
        f"per prompt for --export dpg. Add --num_images {_DPG_PICTURES}.")


def _export_geneval(folder: pathlib.Path, item: Item, pictures) -> None:
  for number, image in enumerate(pictures):
    save_picture(
        Image.fromarray(image), folder / "samples" / f"{number:04d}.png")
  write_text(folder / "metadata.jsonl", json.dumps(item.metadata))


def _grid(pictures: Images) -> Image.Image:
  """Returns four images in a grid without margins, which the scorer splits."""
  rows = [np.concatenate(pictures[i:i + 2], axis=1) for i in (0, 2)]
  return Image.fromarray(np.concatenate(rows))
