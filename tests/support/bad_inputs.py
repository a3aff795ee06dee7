"""Bad inputs of every command; golden/make_errors.py keeps the answers."""

import contextlib
import importlib
import io
import pathlib
import shutil
import sys
import traceback
from unittest import mock

from absl import flags
import jax

from ssd_jax.cli import run as cli
from ssd_jax.pipeline import model_folder

DRAWING = ("generate", "benchmark", "evidence", "demo", "serve")
TRAINING = ("tokenizer", "ar", "mtp", "drafter")
SERVING = ("port", "host", "bench", "decoders", "any_decoder", "aliases",
           "max_waiting", "max_images", "timeout", "drain")
# Flags that a command defines when it starts; other commands may have them too.
OWN = {
    "evidence": ("num_prompts",), "demo": SERVING, "serve": SERVING,
    "convert": ("source", "out", "vq", "text_encoder", "tokenizer", "dtype"),
    "plan": ("topology", "decoder", "batch", "train", "passes", "price",
             "measure", "plot", "hlo", "json"),
    "compare": ("size", "layers", "width", "vocab", "dtype", "tokens",
                "prompt_tokens", "rounds", "loops"),
}
PROMPT = {"generate": ["--prompt", "a"]}
# What is wrong -> arguments; {dir} holds the files that `make_files` wrote.
ANY = {
    "a flag that does not exist": ["--colour", "red"],
    "an argument without a flag": ["stray"],
    "a config that does not exist": ["--config", "{dir}/no.py"],
    "a config with a syntax error": ["--config", "{dir}/syntax.py"],
    "a config that raises": ["--config", "{dir}/raises.py"],
    "a config without settings": ["--config", "{dir}/nothing.py"],
    "an unknown variant of a config": ["--config", "configs/emoji.py:huge"],
    "a config key that does not exist": [
        "--config", "configs/emoji.py", "--config.colour=red"],
    "a config value of the wrong kind": [
        "--config", "configs/emoji.py", "--config.pixels=many"],
}
EMU = ["--config", "configs/emu3_5.py", "--random_weights"]
COMPLETE = {
    "rows without an image": ["--rows", "3"],
    "more rows than there are": ["--complete", "{dir}/mute/b.png", "--rows",
                                 "16"],
    "no image to complete": ["--complete", "{dir}/no.png"],
    "a text to complete": ["--complete", "{dir}/words.txt"],
}
IMAGES = {
    "an image for prompts of text": ["--image", "{dir}/mute/b.png"],
    "an image that is not there": ["--image", "{dir}/no.png"],
    "a text as an image": ["--image", "{dir}/words.txt"],
    "too many images in a prompt": [
        *["--image", "{dir}/mute/b.png"] * 4, *EMU],
    "an image that is a strip": ["--image", "{dir}/strip.png", *EMU],
    "an image for a model that is not here": [
        "--image", "{dir}/mute/b.png", "--model", "janus-pro-1b"],
}
JOB = {
    "a mesh of an unknown axis": ["--mesh", "rows=2"],
    "a mesh without a number": ["--mesh", "data"],
    "a mesh of more devices than there are": ["--mesh", "tensor=9999"],
    "half a job of several hosts": ["--coordinator", "localhost:1"],
    "a process beyond its job": [
        "--coordinator", "localhost:1", "--num_processes", "2", "--process_id",
        "2"],
}
SHARED = {
    "no checkpoint there": ["--checkpoint", "{dir}/nowhere"],
    "an empty folder as checkpoint": ["--checkpoint", "{dir}/empty"],
    "a file as checkpoint": ["--checkpoint", "{dir}/words.txt"],
    "a checkpoint of an unknown family": ["--checkpoint", "{dir}/stranger"],
    "a checkpoint with broken JSON": ["--checkpoint", "{dir}/broken"],
    "a checkpoint without weights": ["--checkpoint", "{dir}/weightless"],
    "a checkpoint with a cut file": ["--checkpoint", "{dir}/cut"],
    "a model of no known name": ["--model", "nosuch"],
    "a repository of no known model": ["--model", "hf:a/b"],
    "two models": ["--model", "simplear", "--checkpoint", "{dir}/cut"],
    "heads that are not there": ["--heads", "{dir}/nowhere"],
    "a drafter that is not there": ["--drafter", "{dir}/nowhere"],
    "a config of another family": ["--config", "configs/janus_pro.py:1b"],
}
PROMPTS = {
    "no file of prompts there": ["--prompts_file", "{dir}/no.txt"],
    "a file of prompts without any": ["--prompts_file", "{dir}/empty.txt"],
    "a file of prompts that is no text": ["--prompts_file", "{dir}/bytes.txt"],
    "a folder without prompts": ["--prompts_file", "{dir}/empty"],
    "a prompt of 10,001 characters": ["--prompts_file", "{dir}/long.txt"],
    "a batch of none": ["--batch", "0"],
    "a seed below zero": ["--seed", "-1"],
    "a seed beyond 32 bits": ["--seed", "4294967296"],
    "a guidance that is no number": ["--guidance", "much"],
    "a guidance of nan": ["--guidance", "nan"],
    "a temperature below zero": ["--temperature", "-1"],
    "a top_k below zero": ["--top_k", "-1"],
    "a top_p beyond one": ["--top_p", "1.5"],
    "an --out that is a file": ["--out", "{dir}/words.txt"],
}
DECODER = {
    "a decoder that does not exist": "stare",
    "an empty decoder": "",
    "a setting that does not exist": "stair:colour=red",
    "a setting without a value": "stair:lookahead",
    "a setting of the wrong kind": "stair:lookahead=far",
    "a setting out of range": "sjd:window=0",
    "heads that the model does not have": "ssd:horizontal=99",
    "drafts of a preview that the model does not have": "exact:drafts=preview",
}
# GLM-Image at toy size; it generates a preview first, and tokens of no pixels.
GLM = ["--config", "configs/glm_image.py", "--random_weights", *(
    f"--config.trunk.{key}={value}" for key, value in dict(
        d_model=64, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=64,
        vocab_in=16_512).items())]
GLM_IMAGE = {
    "a size that GLM-Image lacks": ["--config.size=1000x1000"],
    "guidance for a model without": ["--guidance", "3"],
    "animations after a preview": ["--trace"],
    "an image to complete without pixels": ["--complete", "{dir}/mute/b.png"],
    "an image for a prompt of text": ["--image", "{dir}/mute/b.png"],
    "heads for a model without": ["--decoder", "ssd"],
    "a drafter for a model without": ["--decoder", "eagle"],
    "a painter that is not there": ["--painter", "{dir}/no"],
    "a painter of another kind": ["--painter", "{dir}/empty"],
}
BENCHMARK = {
    "a decoder named twice": ["--decoders", "ar,ar"],
    "no prompts": ["--num_prompts", "0"],
    "no pictures": ["--num_images", "0"],
    "a split that does not exist": ["--split", "test"],
    "a folder of real pictures that is not there": [
        "--real_images", "{dir}/no"],
    "real pictures that are damaged": ["--real_images", "{dir}/torn"],
    "an export that does not exist": ["--export", "coco"],
    "prompts that are not the export's": ["--export", "geneval"],
    "too few pictures for the export": ["--export", "dpg"],
    "too few draws": ["--exactness", "--draws", "10"],
    "a checkpoint for --exactness": ["--exactness", "--checkpoint", "{dir}/no"],
    "no pictures to profile": ["--profile", "--batch", "0"],
    "decoders for --profile": ["--profile", "--decoders", "ar"],
    "a file of decoders without any": ["--decoder_file", "{dir}/nothing.py"],
}
COMPARE = {
    "a size that does not exist": ["--size", "2t"],
    "no layers": ["--layers", "0"],
    "a width without whole heads": ["--width", "100"],
    "a single code": ["--vocab", "1"],
    "tokens that are no square": ["--tokens", "60"],
    "no prompt": ["--prompt_tokens", "0"],
    "no rounds": ["--rounds", "0"],
    "a batch of none": ["--batch", "0"],
    "a decoder that does not exist": ["--loops", "ar,stare"],
}
PLAN = {
    "a slice that does not exist": ["--topology", "v9z:1x1"],
    "a batch of none": ["--batch", "0"],
    "passes below one": ["--passes", "0"],
    "a batch below zero to train on": ["--train", "--batch", "-1"],
    "a decoder to train": ["--train", "--decoder", "ar"],
    "a decoder to measure": ["--measure", "--decoder", "ar"],
    "devices to measure that are not here": [
        "--measure", "--topology", "v5e:1x1"],
    "another embedded model to measure": [
        "--measure", "--config.trunk.n_layers=2"],
    "a plot that is a folder": ["--plot", "{dir}/empty"],
    "a program's text that is a folder": ["--hlo", "{dir}/empty"],
    "a program's text while training": ["--train", "--hlo", "{dir}/x.txt"],
    "no GPUs": ["--topology", "h100:0"],
    "a price of what costs nothing": ["--price", "2"],
    "a plot below a file": ["--plot", "{dir}/words.txt/plot.png"],
}
TRAINED = {
    "a working directory that is a file": ["--workdir", "{dir}/words.txt"],
    "a batch of none": ["--config.{part}.loop.batch=0"],
    "no steps": ["--config.{part}.loop.steps=0"],
    "a learning rate of zero": ["--config.{part}.optimizer.learning_rate=0.0"],
}
DATA = {
    "data of no kind": ["--config.data=cloud"],
    "a folder of pictures that is not there": ["--config.data=folder:{dir}/no"],
    "a folder without pictures": ["--config.data=folder:{dir}/empty"],
    "pictures without captions": ["--config.data=folder:{dir}/mute"],
}
LEARNED = {
    "no model to learn from": [],
    "a checkpoint that is not there": ["--config.checkpoint={dir}/nowhere"],
    "a checkpoint with a cut file": ["--config.checkpoint={dir}/cut"],
    "no file of prompts there": [
        "--config.checkpoint=emoji", "--config.prompts_file={dir}/no.txt"],
    "a single prompt": [
        "--config.checkpoint=emoji", "--config.prompts_file={dir}/one.txt"],
    "a lossy decoder of the images": [
        "--config.checkpoint=emoji", "--config.mtp.draw.decoder=stair"],
    "a decoder of the images that needs heads": [
        "--config.checkpoint=emoji",
        "--config.mtp.draw.decoder=exact:drafts=heads"],
}
CONVERT = {
    "no source": ["--out", "{out}"],
    "no place to write to": ["--source", "{dir}/empty"],
    "a source that is not there": ["--source", "{dir}/no", "--out", "{out}"],
    "a source without a checkpoint": [
        "--source", "{dir}/empty", "--out", "{out}"],
    "a checkpoint that is cut": ["--source", "{dir}/torch", "--out", "{out}"],
    "a dtype that does not exist": ["--source", "{dir}/empty", "--out", "{out}",
                                    "--dtype", "int3"],
    "a text encoder for classes": [
        "--source", "{dir}/empty", "--out", "{out}", "--text_encoder", "none"],
}


def make_files(folder: pathlib.Path) -> None:
  """Writes the bad files that the cases name."""
  jax.devices()  # before a mesh can divide this process's CPU
  texts = {
      "words.txt": "mine\n", "empty.txt": "\n \n", "one.txt": "a red heart\n",
      "long.txt": "x" * 10_001, "syntax.py": "def get_config(:",
      "raises.py": "def get_config():\n  return 1 / 0\n",
      "nothing.py": "x = 3\n",
      "stranger/model.json": '{"family": "cubist"}',
      "broken/model.json": "{", "mute/a.txt": "",
      "stranger/results.json": '{"rows": [3]}',
  }
  for name, text in texts.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  (folder / "bytes.txt").write_bytes(bytes(range(128, 256)))
  (folder / "empty").mkdir()
  for name in ("1.png", "2.png"):
    (folder / "torn").mkdir(exist_ok=True)
    (folder / "torn" / name).write_bytes(b"\x89PNG\r\n")
  (folder / "torch").mkdir()
  (folder / "torch" / "model.safetensors").write_bytes(b"\xff" * 9)
  from PIL import Image
  Image.new("RGB", (4, 4)).save(folder / "mute" / "b.png")
  Image.new("RGB", (99, 4)).save(folder / "strip.png")
  (folder / "mute" / "a.txt").unlink()
  shutil.copytree(model_folder.EMBEDDED, folder / "cut")
  largest = max((f for f in (folder / "cut" / "trunk").rglob("*")
                 if f.is_file()), key=lambda f: f.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:1000])
  shutil.copytree(model_folder.EMBEDDED, folder / "weightless",
                  ignore=shutil.ignore_patterns("trunk", "vq", "heads"))


def _shared(commands, table, whole):
  """The cases of a table: all for one command, the first for the others."""
  for name in commands:
    for what, args in list(table.items())[:None if name == whole else 1]:
      yield name, what, [*PROMPT.get(name, []), *args]


def cases():
  """(command, what is wrong, arguments) of every case.

  What all commands share is fed whole to one of them; of each table the others
  get the first case, which shows that they read it at all.
  """
  yield from _shared(
      (*DRAWING, "convert", *TRAINING, "plan", "compare"), ANY, "generate")
  yield from _shared((*DRAWING, *TRAINING, "plan"), JOB, "mtp")
  yield from _shared(DRAWING, SHARED, "generate")
  yield from _shared(("generate", "benchmark", "evidence"), PROMPTS, "generate")
  flags_of = {"generate": ["--prompt", "a", "--decoder"], "plan": ["--decoder"],
              "benchmark": ["--num_prompts", "1", "--decoders"]}
  for number, (what, text) in enumerate(DECODER.items()):
    for name in flags_of if number == 0 else ("generate",):
      yield name, what, [*flags_of[name], text]
  yield "generate", "no prompt", []
  yield "generate", "an empty prompt", ["--prompt", " \x07 "]
  for what, args in {**COMPLETE, **IMAGES}.items():
    yield "generate", what, ["--prompt", "a", *args]
  for what, args in GLM_IMAGE.items():
    yield "generate", what, ["--prompt", "a", *GLM, *args]
  yield "generate", "a painter for images", [
      "--prompt", "a", "--painter", "{dir}/empty"]
  yield "benchmark", "a model without pixels", GLM
  yield "serve", "a model without pixels", GLM
  yield "plan", "a model of two grids", GLM[:2]
  yield "generate", "no pictures", ["--prompt", "a", "--num_images", "0"]
  yield "generate", "a file of decoders without any", [
      "--prompt", "a", "--decoder_file", "{dir}/nothing.py"]
  for what, args in BENCHMARK.items():
    yield "benchmark", what, args
  yield "evidence", "no prompts", ["--num_prompts", "0"]
  yield "demo", "a port beyond 65535", ["--port", "70000"]
  yield "demo", "a benchmark that is not there", ["--bench", "{dir}/no"]
  yield "demo", "a benchmark of another kind", ["--bench", "{dir}/stranger"]
  yield "demo", "a batch of none", ["--batch", "0"]
  yield "serve", "others let in without a key", ["--host", "0.0.0.0"]
  yield "serve", "no decoder", ["--decoders", ","]
  yield "serve", "an unknown decoder", ["--decoders", "exact,fast"]
  yield "serve", "a queue of none", ["--max_waiting", "0"]
  yield "serve", "no time for a request", ["--timeout", "0"]
  yield "serve", "a negative time to drain", ["--drain=-1"]
  for what, args in PLAN.items():
    yield "plan", what, args
  for what, args in COMPARE.items():
    yield "compare", what, args
  for what, args in CONVERT.items():
    yield "convert", what, ["--config", "configs/llamagen.py", *args]
  yield "convert", "a ratio that a family lacks", [
      "--config", "configs/emu3_5.py:5:4"]
  yield "convert", "a size that a family lacks", [
      "--config", "configs/lumina2.py", "--config.size=9x9", "--source",
      "{dir}/empty", "--out", "{out}"]
  yield "convert", "a family that is not converted", [
      "--source", "{dir}/empty", "--out", "{out}"]
  for name in TRAINING:
    checkpoint = ["--config.checkpoint=emoji"] if name in TRAINING[2:] else []
    for what, args in TRAINED.items():
      args = [x.replace("{part}", name) for x in args]
      yield name, what, ["--config", "configs/emoji.py:smoke", *checkpoint,
                         *args]
    table = DATA if name in TRAINING[:2] else LEARNED
    for what, args in table.items():
      yield name, what, ["--config", "configs/emoji.py:smoke", *args]
  yield "ar", "no tokenizer trained", ["--config", "configs/emoji.py:smoke"]


def feed(name: str, args: list[str], folder: pathlib.Path, instead=None):
  """(exit status, stderr, files written) of a command with bad input.

  Args:
    name: Of the command.
    args: Its arguments.
    folder: Where the files of the cases are.
    instead: Body to run in place of the command's own.
  """
  out = folder / "out"
  shutil.rmtree(out, ignore_errors=True)
  args = [x.format(dir=folder, out=out) for x in args]
  if name in DRAWING[:3] and "--out" not in args:
    args += ["--out", str(out)]
  if name in TRAINING and "--workdir" not in args:
    args += ["--workdir", str(out)]
  body, define = _command(name)
  body, runs_here = instead or body, not instead and name != "plan"
  error = io.StringIO()
  with mock.patch("sys.argv", [name, *args]), (
      _flags_of(name, define)), contextlib.redirect_stderr(error), (
      contextlib.redirect_stdout(io.StringIO())):
    _forget_flags()
    try:
      cli.main(body, [name, *args], runs_here=runs_here)
      status = 0
    except SystemExit as end:
      status = end.code
    except Exception:  # for the test to see
      status = traceback.format_exc()
    finally:
      _forget_flags()
  written = [x for x in out.rglob("*") if x.is_file()] if out.is_dir() else []
  return status, error.getvalue(), written


def _forget_flags() -> None:
  """As no command was run: no flag given, no override, no file of settings."""
  flags.FLAGS.unparse_flags()
  for flag in list(flags.FLAGS):
    if flag == "config" or flag.startswith("config."):
      delattr(flags.FLAGS, flag)
  cli.define_config()  # the flag itself remembers its overrides
  for flag in flags.FLAGS:
    flags.FLAGS[flag].unparse()
  sys.modules.pop("config_config", None)


def _command(name: str):
  if name in TRAINING:
    return getattr(importlib.import_module("ssd_jax.cli.train"), name), None
  module = importlib.import_module(f"ssd_jax.cli.{name}")
  return module.body, getattr(module, "define_flags", None)


@contextlib.contextmanager
def _flags_of(name: str, define):
  """The command's own flags in the place of others of the same names."""
  if "config" not in flags.FLAGS:
    cli.define_config()
  taken = {x: (flags.FLAGS.find_module_defining_flag(x), flags.FLAGS[x])
           for x in OWN.get(name, ()) if x in flags.FLAGS}
  for flag in taken:
    delattr(flags.FLAGS, flag)
  if define:
    define()
  try:
    yield
  finally:
    for flag in OWN.get(name, ()):
      delattr(flags.FLAGS, flag)
    for flag, (module, value) in taken.items():
      flags.FLAGS[flag] = value
      flags.FLAGS.register_flag_by_module(module, value)
