"""Body of infer.generate: prompts in, PNG files out."""

import json
import math
import os
import pathlib
import re
import sys
import unicodedata

from absl import flags
import jax
import numpy as np
from PIL import Image, PngImagePlugin
import tqdm

from ssd_jax.cli import run as cli
from ssd_jax.config import UserError, check
from ssd_jax.decoding import by_name
from ssd_jax.pipeline import Output, Pipeline, load

_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; repeatable.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "Text file with one prompt per line.")
_DECODER = flags.DEFINE_string(
    "decoder", "ar", "NAME or NAME:key=value+key=value.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures per prompt.")
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same pictures.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Divides the logits.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Codes kept; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Probability mass kept.")
_BATCH = flags.DEFINE_integer("batch", 8, "Pictures drawn together.")
_OUT = flags.DEFINE_string("out", "out", "Folder of the pictures.")
_TRACE = flags.DEFINE_bool(
    "trace", False, "Also write an animation of the grid being filled.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "emoji", "Model folder; default: the embedded model.")
_RANDOM_WEIGHTS = flags.DEFINE_bool(
    "random_weights", False, "Random trunk: for trying sizes and speed.")

_LONGEST_PROMPT = 10_000  # characters


def body() -> None:
  """Draws the prompts of the flags and says what it did."""
  prompts = read_prompts(_PROMPT.value, _PROMPTS_FILE.value)
  decoder = by_name.parse(_DECODER.value)
  check(_NUM_IMAGES.value >= 1, "num_images", _NUM_IMAGES.value, ">= 1")
  out = writable_folder(_OUT.value)
  use_compilation_cache()
  pipe = load(_CHECKPOINT.value, random_weights=_RANDOM_WEIGHTS.value)
  total = len(prompts) * _NUM_IMAGES.value
  with tqdm.tqdm(total=total, unit="image", file=sys.stderr) as bar:
    output = pipe.generate(
        prompts, decoder, num_images=_NUM_IMAGES.value, seed=_SEED.value,
        batch=_BATCH.value, trace=_TRACE.value, on_batch=bar.update,
        guidance=_GUIDANCE.value, temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value, top_p=_TOP_P.value,
    )
  paths, sheet = write_pictures(output, out, _settings(pipe))
  for note in output.notes:
    print(f"note: {note}")
  _report(output, decoder, paths, sheet)


def read_prompts(given: list[str], file: str | None) -> list[str]:
  """The prompts of the flags, cleaned, in order.

  Raises:
    UserError: when there is none, or one is empty or too long.
  """
  lines = list(given)
  if file is not None:
    try:
      text = pathlib.Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(
          f"got an unreadable --prompts_file {file}, expected UTF-8 text with "
          "one prompt per line; check the path"
      ) from error
    lines += [line for line in text.splitlines() if line.strip()]
  if not lines:
    raise UserError(
        'got no prompt, expected at least one; add --prompt "red heart" or '
        "--prompts_file FILE"
    )
  return [clean(line) for line in lines]


def clean(prompt: str) -> str:
  """A prompt without control characters and surplus white space."""
  printable = "".join(
      " " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c
      for c in prompt
  )
  text = " ".join(printable.split())
  if not text:
    raise UserError(
        f"got an empty prompt {prompt[:20]!r}, expected a few words; say what "
        "to draw"
    )
  if len(text) > _LONGEST_PROMPT:
    raise UserError(
        f"got a prompt of {len(text)} characters, expected at most "
        f"{_LONGEST_PROMPT}; shorten it"
    )
  return text


def writable_folder(path: str) -> pathlib.Path:
  """The output folder, made and seen to be writable before any work."""
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
        f"got --out {path}, expected a folder that can be made "
        f"({error.strerror}); choose another"
    ) from error
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(
        f"got --out {path}, expected a folder that can be written; change its "
        "permissions or choose another"
    )
  return folder


def use_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder between runs."""
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(root) / "ssd_jax" / "xla"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def write_pictures(
    output: Output, folder: pathlib.Path, settings: dict
) -> tuple[list[pathlib.Path], pathlib.Path | None]:
  """(paths of the PNGs, path of the contact sheet of several)."""
  paths = []
  for index, (image, prompt) in enumerate(
      zip(output.pil_images, output.prompts, strict=True)
  ):
    metadata = PngImagePlugin.PngInfo()
    facts = {"prompt": prompt, "index": index,
             "passes": int(output.passes[index]), **settings}
    for key, value in facts.items():
      metadata.add_itxt(key, str(value))
    path = folder / f"{index:04d}_{file_name(prompt)}.png"
    save_picture(image, path, pnginfo=metadata)
    paths.append(path)
  if len(paths) == 1:
    return paths, None
  sheet = folder / "contact_sheet.png"
  save_picture(contact_sheet(output.images), sheet)
  return paths, sheet


def file_name(prompt: str) -> str:
  """A prompt as a part of a file name: letters and digits of any script."""
  return re.sub(r"\W+", "_", prompt).strip("_")[:40] or "prompt"


def save_picture(image: Image.Image, path: pathlib.Path, **kwargs) -> None:
  """Writes a PNG by one rename."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    image.save(partial, "png", **kwargs)
    os.replace(partial, path)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise UserError(
        f"got {error.strerror} while writing {path}, expected a folder with "
        "room that can be written; choose another --out"
    ) from error


def contact_sheet(images: np.ndarray, columns: int | None = None):
  """All pictures on one, row by row, with a thin white margin."""
  count, height, width, _ = images.shape
  columns = columns or min(8, math.ceil(math.sqrt(count)))
  gap = 4
  rows = math.ceil(count / columns)
  sheet = Image.new(
      "RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap),
      "white",
  )
  for index, image in enumerate(images):
    row, column = divmod(index, columns)
    sheet.paste(Image.fromarray(image),
                (gap + column * (width + gap), gap + row * (height + gap)))
  return sheet


def _settings(pipe: Pipeline) -> dict:
  """The settings that go into each picture's metadata."""
  sampling, _ = pipe.sampling(
      guidance=_GUIDANCE.value, temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value, top_p=_TOP_P.value,
  )
  return {
      "seed": _SEED.value, "decoder": _DECODER.value,
      "guidance": round(float(sampling.guidance), 6),
      "temperature": round(float(sampling.temperature), 6),
      "top_k": int(sampling.top_k), "top_p": round(float(sampling.top_p), 6),
      "software": "ssd_jax",
  }


def _report(output: Output, decoder, paths, sheet) -> None:
  cells = output.tokens[0].size
  passes = [int(p) for p in output.passes]
  mean = float(np.mean([cells / p for p in passes]))
  law = "the law of AR sampling" if decoder.lossless else "relaxed"
  print(
      f"{len(paths)} pictures by {_DECODER.value} ({law}): {cells} cells in "
      f"{np.mean(passes):.1f} passes each, {output.seconds:.1f} s, after "
      f"{output.compile_seconds:.1f} s of compiling"
  )
  for path in [*paths, *([sheet] if sheet else [])]:
    print(path)
  if _JSON.value:
    print(json.dumps({
        "decoder": decoder.name, "settings": by_name.settings(decoder),
        "lossless": bool(decoder.lossless), "prompts": list(output.prompts),
        "images": [str(p) for p in paths],
        "contact_sheet": str(sheet) if sheet else None,
        "cells": cells, "passes": passes, "tokens_per_pass": mean,
        "compile_seconds": round(output.compile_seconds, 3),
        "seconds": round(output.seconds, 3),
    }))


def main() -> None:
  """Console entry point."""
  cli.define_config()
  cli.main(body)
