"""Converts a made-up checkpoint of full size; prints memory and time.

    python -m tests.support.full_size configs/lumina.py 0 bfloat16
    python -m tests.support.full_size configs/janus_pro.py:7b 0 bfloat16
    python -m tests.support.full_size configs/emu3.py 0 float32

writes a checkpoint of that configuration with that many layers (0 for all) in
that dtype, shard by shard in the kind of files its authors chose, runs
infer.convert on it and prints the largest resident memory of the conversion.
Fails when that is 4 GB or more. Needs disk: about twice the checkpoint's size.
"""

import importlib.util
import json
import math
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import ml_dtypes
import numpy as np

from ssd_jax.convert.registry import RECIPES

_DTYPES = {"float32": (np.float32, "F32", "FloatStorage"),
           "bfloat16": (ml_dtypes.bfloat16, "BF16", "BFloat16Storage")}
_PICKLED = ("janus",)  # families whose shards are torch's
_SHARD = 2 * 2**30  # bytes
_BOUND = 4e9  # bytes of memory, for any size


def main(config_file: str, layers: int, dtype: str) -> None:
  """Makes, converts, reports."""
  file, _, variant = config_file.partition(":")
  spec = importlib.util.spec_from_file_location("config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(variant)
  layers = layers or config.trunk.n_layers
  config.trunk.n_layers = layers
  recipe = RECIPES[config.family](config)
  pathlib.Path("build").mkdir(exist_ok=True)  # which git ignores
  folder = pathlib.Path(tempfile.mkdtemp(dir="build"))
  try:
    places = {part.flag: folder / part.flag for part in recipe.parts}
    for part in recipe.parts:
      write_part(places[part.flag], part, dtype, config.family in _PICKLED)
    for name in recipe.tokenizer:
      (folder / "source" / name.removeprefix("**/")).write_text("{}")
    flags = [f"--{flag}={place}" for flag, place in places.items()]
    command = [sys.executable, "-m", "infer.convert", "--config", config_file,
               f"--config.trunk.n_layers={layers}", "--out", folder / "out",
               *flags]
    start = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    report = json.loads((folder / "out" / "report.json").read_text())
    read = sum(file["bytes"] for file in report["files"])
    print(f"{config_file}, {layers} layers: {read / 1e9:.1f} GB of {dtype} "
          f"read, {report['bytes'] / 1e9:.1f} GB written in {seconds:.0f} s, "
          f"peak memory {peak / 1e9:.2f} GB")
    assert peak < _BOUND
  finally:
    shutil.rmtree(folder)


def write_part(
    folder: pathlib.Path, part, dtype: str, is_pickled: bool
) -> None:
  """Shards of random tensors and their index, or the one file looked for."""
  part = part.resolved(part.required)  # tied heads are stored once
  shapes = {s.name: s.shape for row in part.table.rows for s in row.sources}
  folder.mkdir()
  if not any("index" in pattern for pattern in part.patterns):
    # A glob such as [de][en]coder.jit stands for the file of its first letters.
    name = re.sub(r"\[(.).*?\]", r"\1", part.patterns[0].removeprefix("**/"))
    write_shard(folder / name, shapes, dtype)
    return
  shards, size = [[]], 0
  for name, shape in shapes.items():
    if size > _SHARD:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += math.prod(shape) * np.dtype(_DTYPES[dtype][0]).itemsize
  stem, tail = (("pytorch_model", "bin") if is_pickled
                else ("model", "safetensors"))
  index = {}
  for i, names in enumerate(shards):
    file = f"{stem}-{i:05d}.{tail}"
    write_shard(folder / file, {n: shapes[n] for n in names}, dtype)
    index |= dict.fromkeys(names, file)
  (folder / f"{stem}.{tail}.index.json").write_text(
      json.dumps({"weight_map": index}))


def write_shard(file: pathlib.Path, shapes: dict, dtype: str) -> None:
  """One file: safetensors by its name, or as torch saves a dictionary."""
  if file.suffix == ".safetensors":
    write_safetensors(file, shapes, dtype)
    return
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("model/data.pkl", pickled(shapes, _DTYPES[dtype][2]))
    for i, shape in enumerate(shapes.values()):
      with archive.open(f"model/data/{i}", "w", force_zip64=True) as entry:
        write_numbers(entry, math.prod(shape), dtype)


def write_safetensors(file: pathlib.Path, shapes: dict, dtype: str) -> None:
  """A header and the numbers."""
  kind, name, _ = _DTYPES[dtype]
  header, offset = {}, 0
  for key, shape in shapes.items():
    size = math.prod(shape) * np.dtype(kind).itemsize
    header[key] = {"dtype": name, "shape": shape,
                   "data_offsets": [offset, offset + size]}
    offset += size
  text = json.dumps(header).encode()
  with open(file, "wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
      write_numbers(f, math.prod(shape), dtype)


def write_numbers(file, count: int, dtype: str) -> None:
  """A block of random numbers, over and over."""
  kind = _DTYPES[dtype][0]
  block = np.random.default_rng(0).uniform(0.5, 1.5, 2**22).astype(kind)
  while count > 0:
    file.write(block[:count].tobytes())
    count -= block.size


def pickled(shapes: dict, storage: str) -> bytes:
  """torch's pickle of tensors by name, each a whole storage of its own."""
  text = lambda x: b"X" + len(x.encode()).to_bytes(4, "little") + x.encode()
  number = lambda x: b"\x8a\x08" + x.to_bytes(8, "little")
  together = lambda parts: b"(" + b"".join(parts) + b"t"
  tensors = []
  for i, (name, shape) in enumerate(shapes.items()):
    strides = [math.prod(shape[j + 1:]) for j in range(len(shape))]
    place = together([
        text("storage"), f"ctorch\n{storage}\n".encode(), text(str(i)),
        text("cpu"), number(math.prod(shape))]) + b"Q"
    view = together([
        place, number(0), together(map(number, shape)),
        together(map(number, strides)), b"\x89",
        b"ccollections\nOrderedDict\n)R"])
    tensors.append(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + view
                   + b"R")
  return b"\x80\x02}(" + b"".join(tensors) + b"u."


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
