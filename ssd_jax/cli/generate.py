"""Body of infer.generate: prompts in, PNG files out."""

import json
import pathlib
import re
from typing import Any

from absl import flags
import jax
import numpy as np
from PIL import Image, PngImagePlugin

from ssd_jax import __version__
from ssd_jax.cli import common, run as cli
from ssd_jax.core.config import UserError, check
from ssd_jax.core.outputs import Output, Picture
from ssd_jax.core.prompts import clean
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding import registry
from ssd_jax.decoding.ar import AR
from ssd_jax.evaluation import prompt_files
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Bar
from ssd_jax.visualization import animations
from ssd_jax.visualization.contact_sheets import captioned, save_picture

common.define_flags(
    "prompts_file", "num_images", "seed", "batch", "out", "decoder_file",
    *common.SAMPLING, *common.MODEL)

_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; repeatable.")
_DECODER = flags.DEFINE_string(
    "decoder", "exact", "NAME or NAME:key=value+key=value.")
_TRACE = flags.DEFINE_bool(
    "trace", False, "Also write how the grid was filled: animations, with AR "
    "beside the decoder for the first prompt, and heat maps.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")

_SHEET_PICTURES = 64  # at most


def body() -> None:
  """Draws the prompts of the flags and says what it did."""
  prompts = read_prompts(_PROMPT.value, flags.FLAGS.prompts_file)
  known = registry.with_file(flags.FLAGS.decoder_file)
  decoder = registry.parse(_DECODER.value, known)
  number = flags.FLAGS.num_images
  check(number >= 1, "num_images", number, ">= 1")
  check(not _TRACE.value or jax.process_count() == 1, "trace", True,
        "a single host")
  out = common.writable_folder(flags.FLAGS.out or "out")
  cli.use_compilation_cache()
  pipe = common.load_pipeline()
  album = Album(out, _settings(pipe))
  times, notes, output = _draw(pipe, prompts, decoder, album)
  album.close()
  sharding.barrier("pictures are written")
  if jax.process_index():
    return  # the first host tells
  for note in [*notes, *album.notes]:
    print(f"note: {note}")
  if output:
    _write_trace(pipe, output, decoder, album.paths)
  _report(pipe, decoder, album, times)


def _draw(
    pipe: Pipeline, prompts: list[str], decoder: Decoder, album: "Album"
) -> tuple[tuple[float, float], list[str], Output | None]:
  """((seconds of compiling, the rest), notes, all pictures for --trace)."""
  number = flags.FLAGS.num_images
  args: dict[str, Any] = dict(
      num_images=number, seed=flags.FLAGS.seed,
      batch=8 if flags.FLAGS.batch is None else flags.FLAGS.batch,
      **common.sampling())
  with Bar(total=len(prompts) * number, unit="image",
           unit_scale=not _TRACE.value, desc="compiling") as bar:
    def on_step(pictures):
      bar.set_description("drawing", refresh=False)
      bar.update(pictures)

    if _TRACE.value:  # needs all pictures together
      output = pipe.generate(
          prompts, decoder, trace=True, on_batch=on_step, **args)
      for picture in output.pictures:
        album.add(picture)
      return (output.compile_seconds, output.seconds), [*output.notes], output
    stream = pipe.stream(prompts, decoder, on_step=on_step, **args)
    for picture in stream:
      album.add(picture)
  return (stream.clock.compiling, stream.clock.rest()), stream.notes, None


def read_prompts(given: list[str], file: str | None) -> list[str]:
  """The prompts of the flags, cleaned, in order.

  Raises:
    UserError: when there is none, or one is empty or too long.
  """
  lines = list(given)
  if file is not None:
    lines += [item.prompt for item in prompt_files.read_prompts(file)]
  if not lines:
    raise UserError(
        'Expected at least one prompt, got none. Add --prompt "red heart" or '
        "--prompts_file FILE."
    )
  return [clean(line) for line in lines]


class Album:
  """Pictures written as they finish; few of them stay in memory.

  Several hosts, which all hold the pictures, each write their share.

  Attributes:
    sheet: Path of the contact sheet of several, once closed.
  """

  def __init__(self, folder: pathlib.Path, settings: dict):
    self._folder, self._settings = folder, settings
    self._written: dict[int, tuple[pathlib.Path, str, int]] = {}
    self._first: dict[int, tuple[str, np.ndarray]] = {}
    self.sheet: pathlib.Path | None = None

  def add(self, picture: Picture) -> None:
    """Writes a PNG with its prompt and settings."""
    index, prompt = picture.index, picture.prompt
    path = self._folder / f"{index:04d}_{file_name(prompt)}.png"
    if index % jax.process_count() == jax.process_index():
      metadata = PngImagePlugin.PngInfo()
      facts = {"prompt": prompt, "index": index, "passes": picture.passes}
      for key, value in {**facts, **self._settings}.items():
        metadata.add_itxt(key, str(value))
      save_picture(Image.fromarray(picture.image), path, pnginfo=metadata)
    self._written[index] = (path, prompt, picture.passes)
    if index < _SHEET_PICTURES:
      self._first[index] = (prompt, picture.image)

  def close(self) -> None:
    """Writes the contact sheet of the first pictures, if there are several."""
    sheet = self._folder / "contact_sheet.png"
    if len(self._written) == 1:
      sheet.unlink(missing_ok=True)  # of an earlier run
      return
    self.sheet = sheet
    if jax.process_index() == 0:
      prompts, images = zip(
          *(self._first[i] for i in sorted(self._first)), strict=True)
      save_picture(captioned(images, prompts), self.sheet)

  @property
  def paths(self) -> list[pathlib.Path]:
    """Of the PNGs, by index."""
    return [self._written[i][0] for i in sorted(self._written)]

  @property
  def prompts(self) -> list[str]:
    """Of each picture, by index."""
    return [self._written[i][1] for i in sorted(self._written)]

  @property
  def passes(self) -> list[int]:
    """Of each picture, by index."""
    return [self._written[i][2] for i in sorted(self._written)]

  @property
  def notes(self) -> list[str]:
    """What the user should know about the folder."""
    notes, count = [], len(self._first)
    if len(self._written) > count:
      notes.append(f"the contact sheet shows the first {count} pictures")
    others = set(self._folder.glob("[0-9]" * 4 + "_*.png")) - set(self.paths)
    if others:
      notes.append(
          f"{self._folder} also holds {len(others)} pictures of earlier runs")
    return notes


def file_name(prompt: str) -> str:
  """A prompt as a part of a file name: letters and digits of any script.

  >>> file_name("../a red/heart?")
  'a_red_heart'
  """
  return re.sub(r"\W+", "_", prompt).strip("_")[:40] or "prompt"


def _settings(pipe: Pipeline) -> dict:
  """The settings that go into each picture's metadata."""
  sampling, _ = pipe.sampling(**common.sampling())
  return {
      "seed": flags.FLAGS.seed, "decoder": _DECODER.value,
      "guidance": round(float(sampling.guidance), 6),
      "temperature": round(float(sampling.temperature), 6),
      "top_k": int(sampling.top_k), "top_p": round(float(sampling.top_p), 6),
      "checkpoint": flags.FLAGS.checkpoint or pipe.family.name,
      "software": f"ssd_jax {__version__}",
  }


def _write_trace(pipe: Pipeline, output: Output, decoder, paths) -> None:
  """Writes how the pictures came to be, and AR beside the decoder."""
  stems = [path.with_suffix("") for path in paths]
  written = animations.write_trace(pipe, output, stems, _DECODER.value)
  if decoder != AR():
    race = paths[0].with_name("beside_ar.gif")
    animations.write_race(
        pipe, output.prompts[0], decoder, _DECODER.value, race,
        seed=flags.FLAGS.seed, **common.sampling())
    written.append(race)
  for path in written:
    print(path)


def _report(
    pipe: Pipeline, decoder, album: Album, times: tuple[float, float]
) -> None:
  """Prints what was drawn; `times` are (compiling, the rest)."""
  cells, passes, paths = pipe.model.grid.num_tokens, album.passes, album.paths
  mean = float(np.mean([cells / p for p in passes]))
  is_lossless = decoder.is_lossless(pipe.model.grid)
  distribution = "the law of AR sampling" if is_lossless else "relaxed"
  compiling, seconds = times
  print(
    f"{len(paths)} pictures by {_DECODER.value} ({distribution}): {cells} cells in "
    f"{np.mean(passes):.1f} passes each, {seconds:.1f} s, after "
    f"{compiling:.1f} s of compiling"
  )
  for path in [*paths, *([album.sheet] if album.sheet else [])]:
    print(path)
  if _JSON.value:
    print(json.dumps({
        "decoder": decoder.name, "settings": registry.settings(decoder),
        "lossless": is_lossless, "prompts": album.prompts,
        "images": [str(p) for p in paths],
        "contact_sheet": str(album.sheet) if album.sheet else None,
        "cells": cells, "passes": passes, "tokens_per_pass": mean,
        "compile_seconds": round(compiling, 3), "seconds": round(seconds, 3),
    }))


def main() -> None:
  """Console entry point."""
  cli.define_config()
  cli.main(body, draws=True)
