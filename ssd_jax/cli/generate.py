"""Body of infer.generate: prompts in, PNG files out."""

import json
import os
import pathlib
from typing import Any

from absl import flags
import jax
import numpy as np
from PIL import Image

from ssd_jax import __version__
from ssd_jax.cli import common, run as cli
from ssd_jax.core.config import UserError, check
from ssd_jax.core.outputs import Output
from ssd_jax.core.prompts import clean
from ssd_jax.core.protocols import Decoder
from ssd_jax.data import pictures
from ssd_jax.decoding import registry
from ssd_jax.decoding.ar import AR
from ssd_jax.evaluation import prompt_files
from ssd_jax.pipeline import painting
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage import image_files
from ssd_jax.visualization import animations
from ssd_jax.visualization.album import Album
from ssd_jax.visualization.token_files import TokenFiles

common.define_flags(
    "prompts_file", "num_images", "seed", "batch", "out", "decoder_file",
    *common.SAMPLING, *common.MODEL)

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; repeatable.")
_DECODER = flags.DEFINE_string(
    "decoder", "exact", "NAME or NAME:key=value+key=value.")
_TRACE = flags.DEFINE_bool(
    "trace", False, "Also write animations of the grid being filled, with AR "
    "beside the decoder for the first prompt, and heat maps.")
_COMPLETE = flags.DEFINE_string(
    "complete", None, "Image whose upper rows are kept; the rest is generated.")
_ROWS = flags.DEFINE_integer(
    "rows", None, "Rows of tokens that --complete keeps; default: half.")
_IMAGES = flags.DEFINE_multi_string(
    "image", [], "Image that each prompt contains, for families that read "
    "images; repeatable. The output has the size of a single one, unless "
    "--config says otherwise.")
_PAINTER = flags.DEFINE_string(
    "painter", None, "Folder or ORG/NAME of a GlmImagePipeline of diffusers, "
    "which decodes GLM-Image's tokens. Default: only tokens are written. "
    "Needs the extra 'diffusers'.")
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON at the end.")


def body() -> None:
  """Generates the prompts of the flags and reports."""
  prompts = read_prompts(_PROMPT.value, flags.FLAGS.prompts_file)
  known = registry.with_file(flags.FLAGS.decoder_file)
  decoder = registry.parse(_DECODER.value, known)
  number = flags.FLAGS.num_images
  check(number >= 1, "num_images", number, ">= 1")
  check(not _TRACE.value or jax.process_count() == 1, "trace", True,
        "a single host")
  out = common.writable_folder(flags.FLAGS.out or "out")
  cli.use_compilation_cache()
  images = [image_files.read(file, "--image") for file in _IMAGES.value]
  pipe = common.load_pipeline(pixels=False, images=images)
  prefix = _prefix(pipe)
  has_pixels = pipe.image_shape[0] > 0
  if _PAINTER.value is not None:
    check(not has_pixels, "painter", _PAINTER.value,
          f"left out: {pipe.family.name} decodes its own images")
    painting.check_painter(_PAINTER.value)
  album = (Album if has_pixels else TokenFiles)(out, _settings(pipe))
  times, notes, output = _generate(pipe, prompts, decoder, album, prefix,
                                   images)
  album.close()
  sharding.barrier("images are written")
  if jax.process_index():
    return  # the first host reports
  for note in [*notes, *album.notes]:
    print(f"note: {note}")
  if output:
    _write_trace(pipe, output, decoder, album.paths, images)
  painted = []
  if isinstance(album, TokenFiles) and _PAINTER.value is not None:
    painted = album.paint(painting.load(_PAINTER.value), flags.FLAGS.seed)
  _report(pipe, decoder, album, painted, times)


def _generate(
    pipe: Pipeline, prompts: list[str], decoder: Decoder,
    album: Album | TokenFiles,
    prefix: np.ndarray | None, images: list[Image.Image],
) -> tuple[tuple[float, float], list[str], Output | None]:
  """Returns ((seconds compiling, others), notes, output of --trace)."""
  number = flags.FLAGS.num_images
  args: dict[str, Any] = dict(
      num_images=number, seed=flags.FLAGS.seed,
      batch=8 if flags.FLAGS.batch is None else flags.FLAGS.batch,
      images=images, **common.sampling())
  with Bar(total=len(prompts) * number, unit="image",
           unit_scale=not _TRACE.value, desc="compiling") as bar:
    def on_step(images):
      bar.set_description("generating", refresh=False)
      bar.update(images)

    is_stream = pipe.model.preview is None and prefix is None
    if _TRACE.value or not is_stream:  # needs all images together
      output = pipe.generate(
          prompts, decoder, trace=_TRACE.value, on_batch=on_step, prefix=prefix,
          **args)
      for picture in output.pictures:
        album.add(picture)
      times = output.compile_seconds, output.seconds
      return times, [*output.notes], output if _TRACE.value else None
    stream = pipe.stream(prompts, decoder, on_step=on_step, **args)
    for picture in stream:
      album.add(picture)
  return (stream.clock.compiling, stream.clock.rest()), stream.notes, None


def _prefix(pipe: Pipeline) -> np.ndarray | None:
  """Returns the rows of tokens that --complete keeps, int32 [rows, C].

  Raises:
    UserError: if there are none, or all, or the image cannot be read.
  """
  if _COMPLETE.value is None:
    check(_ROWS.value is None, "rows", _ROWS.value, "given with --complete")
    return None
  check(pipe.image_shape[0] > 0, "complete", _COMPLETE.value,
        "left out: this model's tokens are not codes of pixels")
  grid = pipe.model.grid
  rows = grid.rows // 2 if _ROWS.value is None else _ROWS.value
  check(0 < rows < grid.rows, "rows", rows, f"in [1, {grid.rows - 1}]")
  height, width = pipe.image_shape[:2]
  image = pictures.read(_COMPLETE.value, "--complete", width, height)
  return pipe.encode_images(image[None])[0, :rows]


def read_prompts(given: list[str], file: str | None) -> list[str]:
  """Returns the prompts of the flags, cleaned, in order.

  Raises:
    UserError: if there is none, or one is empty or too long.
  """
  lines = list(map(_typed, given))
  if file is not None:
    lines += [item.prompt for item in prompt_files.read_prompts(file)]
  if not lines:
    raise UserError(
        'Expected at least one prompt, got none. Add --prompt "red heart" or '
        "--prompts_file FILE."
    )
  return [clean(line) for line in lines]


def _typed(text: str) -> str:
  """Returns an argument in UTF-8, though the locale may be ASCII or Latin-1."""
  try:
    return os.fsencode(text).decode("utf-8")
  except UnicodeError:
    return text


def _settings(pipe: Pipeline) -> dict:
  """Returns the settings that go into each image's metadata."""
  sampling, _ = pipe.sampling(**common.sampling())
  return {
      "seed": flags.FLAGS.seed, "decoder": _DECODER.value,
      "guidance": round(float(sampling.guidance), 6),
      "temperature": round(float(sampling.temperature), 6),
      "top_k": int(sampling.top_k), "top_p": round(float(sampling.top_p), 6),
      "checkpoint": common.model_name() or pipe.family.name,
      "software": f"ssd_jax {__version__}",
      **({"images": ", ".join(_IMAGES.value)} if _IMAGES.value else {}),
  }


def _write_trace(
    pipe: Pipeline, output: Output, decoder, paths, images: list[Image.Image],
) -> None:
  """Writes the trace of each image, and AR beside the decoder."""
  stems = [path.with_suffix("") for path in paths]
  written = animations.write_trace(pipe, output, stems, _DECODER.value)
  if decoder != AR():
    race = paths[0].with_name("beside_ar.gif")
    animations.write_race(
        pipe, output.prompts[0], decoder, _DECODER.value, race,
        seed=flags.FLAGS.seed, images=images, **common.sampling())
    written.append(race)
  for path in written:
    print(path)


def _report(
    pipe: Pipeline, decoder, album: Album | TokenFiles,
    painted: list[pathlib.Path], times: tuple[float, float],
) -> None:
  """Reports what was generated; `times` are (compiling, other) seconds."""
  passes, paths = album.passes, album.paths
  grid, preview = pipe.model.grid, pipe.model.preview
  num_tokens = grid.num_tokens + (preview.num_tokens if preview else 0)
  mean = float(np.mean([num_tokens / p for p in passes]))
  is_lossless = decoder.is_lossless(pipe.model.grid)
  kind = "lossless" if is_lossless else "lossy"
  compiling, seconds = times
  print(f"{len(paths)} images by {_DECODER.value} ({kind}): {num_tokens} "
        f"tokens in {np.mean(passes):.1f} passes each, {seconds:.1f} s, after "
        f"{compiling:.1f} s of compiling")
  for path in [*paths, *painted, *([album.sheet] if album.sheet else [])]:
    print(path)
  if _JSON.value:
    print(json.dumps({
        "decoder": decoder.name, "settings": registry.settings(decoder),
        "lossless": is_lossless, "prompts": album.prompts,
        "images": [str(p) for p in paths],
        **({"painted": [str(p) for p in painted]} if painted else {}),
        "contact_sheet": str(album.sheet) if album.sheet else None,
        "cells": num_tokens, "passes": passes, "tokens_per_pass": mean,
        "compile_seconds": round(compiling, 3), "seconds": round(seconds, 3),
    }))


def main() -> None:
  """Console entry point."""
  cli.define_config()
  cli.main(body, draws=True)
