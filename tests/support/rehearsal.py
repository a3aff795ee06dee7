"""docs/scale.md rehearsed: from a checkpoint to heads, a drafter and images.

    python -m tests.support.rehearsal --folder DIR --side 48 --kills 10

A small model in Lumina's published layout, trained on the emoji's tokens, goes
through the page's commands: once alone, and once on four processes of two
devices, killed at random moments and ended by two processes. Both must end in
the same images and heads. `tests/parity/test_rehearsal.py` runs it in small.
"""

import dataclasses
import functools
import json
import os
import pathlib
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssd_jax.convert import convert, lumina as recipes
from ssd_jax.convert.checkpoint_files import Checkpoint
from ssd_jax.data import sources
from ssd_jax.decoding import continuous_batching
from ssd_jax.families import lumina
from ssd_jax.pipeline import model_folder
from ssd_jax.storage import checkpoints
from tests.support import ROOT
from tests.support.toy_weights import (
  CODES,
  InMemory,
  shrink_trunk,
  shrink_vq,
  toy,
  write_safetensors,
)

_IDS = dict(first_code=4, end_of_row=40, image=37, end_of_turn=41, size=42)
_WORDS = 96  # rows of the input table before the words of the captions
_PATCH = 16  # pixels of a token
# Places in the page's commands -> what stands there in a rehearsal.
_PLACES = {"hf:Alpha-VLLM/Lumina-mGPT-7B-768": "published",
           "CHAMELEON_DIR": "published"}


@dataclasses.dataclass(frozen=True)
class Size:
  """How large a rehearsal is.

  Attributes:
    side: Tokens per side of the grid.
    images: Captions, held-out ones among them.
    trunk_steps: Steps in which the trunk learns the emoji's tokens.
    steps: Steps of heads and drafter.
  """

  side: int = 48
  images: int = 40
  trunk_steps: int = 100
  steps: int = 12


def captions(count):
  """The first captions of the vendored emoji."""
  source = sources.open_source("emoji", "train", 128)
  return list(dict.fromkeys(map(source.caption, range(4 * count))))[:count]


def settings(size, vocab):
  """Lumina's settings at the size of a rehearsal."""
  config = lumina.get_config("768")
  pixels = _PATCH * size.side
  config.target_size, config.size = pixels, f"{pixels}x{pixels}"
  config.ids.update(**_IDS)
  shrink_trunk(config, vocab)
  shrink_vq(config, levels=5)
  config.num_prompts = size.images
  config.mtp.heads.update(horizontal=5, vertical=2)
  config.mtp.draw.update(batch=4, shard=8)
  config.mtp.watch.update(every=0)
  for part in (config.mtp, config.drafter):
    part.loop.update(steps=size.steps, batch=8, save_every=2, eval_every=100,
                     log_every=1)
    part.update(eval_images=2)
    part.optimizer.learning_rate = 1e-3
  config.drafter.update(depth=2)
  return config


def make(folder, size):
  """Writes configs/, published/, prompts.txt and wishes.txt into a folder."""
  texts = captions(size.images)
  words = sorted({word for text in [*texts, lumina_words(size)]
                  for word in re.findall(r"\w+|[^\w\s]+", text)})
  config = settings(size, _WORDS + len(words) + 1)
  published = folder / "published"
  published.mkdir(parents=True)
  write_tokenizer(published / "tokenizer.json", words, config)
  write_tokenizer(folder / "tokenizer" / "tokenizer.json", words, config)
  (folder / "configs").mkdir()
  (folder / "configs" / "lumina.py").write_text(
      "import json, ml_collections\n"
      "get_config = lambda variant='': ml_collections.ConfigDict(json.loads(\n"
      f"    {config.to_json()!r}))\n")
  (folder / "prompts.txt").write_text("\n".join(texts) + "\n")
  (folder / "wishes.txt").write_text("\n".join(texts[:2]) + "\n")
  trunk = fit_trunk(lumina.Lumina(config, folder), texts, size)
  tensors = as_published(config, trunk, folder / "converted_once")
  keys, index = sorted(tensors), {}
  for i, part in enumerate((keys[::2], keys[1::2])):
    name = f"model-{i + 1:05d}-of-00002.safetensors"
    write_safetensors(published / name, {key: tensors[key] for key in part})
    index |= dict.fromkeys(part, name)
  (published / "model.safetensors.index.json").write_text(
      json.dumps({"metadata": {}, "weight_map": index}))
  write_safetensors(published / "vqgan.safetensors", {
      s.name: toy(s.name, s.shape)
      for row in recipes.chameleon_vq(lumina.Lumina(config)).table.rows
      for s in row.sources})


def lumina_words(size):
  """What Lumina's prompts say beside the caption."""
  pixels = _PATCH * size.side
  return (f"Generate an image of {pixels}x{pixels} according to the following "
          "prompt:\n")


def write_tokenizer(file, words, config):
  """A tokenizer of whole words, in the format of Hugging Face's library."""
  file.parent.mkdir(exist_ok=True)
  digits = str.maketrans("0123456789", "ABCDEFGHIJ")
  special = {"<s>": 0, "<racm3:break>": _IDS["image"],
             "<reserved08799>": _IDS["end_of_row"],
             "<reserved08706>": _IDS["end_of_turn"],
             "<reserved08800>": _IDS["size"]}
  special |= {f"IMGIMG{str(code).translate(digits)}Z":
              _IDS["first_code"] + code for code in range(CODES)}
  others = sorted(set(range(_WORDS)) - set(special.values()))
  special |= {f"<{i}>": i for i in others}
  vocab = special | {word: _WORDS + 1 + i for i, word in enumerate(words)}
  vocab["<unk>"] = _WORDS
  added = [dict(id=i, content=name, single_word=False, lstrip=False,
                rstrip=False, normalized=False, special=True)
           for name, i in sorted(special.items(), key=lambda x: x[1])]
  file.write_text(json.dumps({
      "version": "1.0", "truncation": None, "padding": None,
      "added_tokens": added, "normalizer": None,
      "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
      "decoder": None,
      "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}}))


def fit_trunk(family, texts, size):
  """Parameters of a trunk that has seen the emoji's tokens, as numpy arrays."""
  generator = family.generator
  tokens_IN = emoji_tokens(generator.grid, size)
  params = jax.jit(generator.init)(jax.random.key(0))
  optimizer = optax.adam(3e-3)
  is_free_N = jnp.asarray(~generator.grid.is_forced)

  @jax.jit
  def step(params, state, prompt, tokens_BN):
    def loss(params):
      hidden = generator.hidden(params, prompt, tokens_BN)
      each_BN = optax.softmax_cross_entropy_with_integer_labels(
          generator.logits(params, hidden), jnp.minimum(tokens_BN, CODES - 1))
      return jnp.sum(each_BN * is_free_N) / is_free_N.sum() / len(tokens_BN)

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  state, rng = optimizer.init(params), np.random.default_rng(0)
  for number in range(size.trunk_steps):
    batch = rng.choice(len(texts), 2)
    prompt, _ = family.encode_prompts([texts[i] for i in batch], False)
    prompt = continuous_batching.widen(prompt, 64)  # one program for all
    params, state, value = step(params, state, prompt, tokens_IN[batch])
    if number % 20 == 0:
      print(f"trunk: step {number}, loss {value:.3f}", flush=True)
  return jax.tree.map(np.asarray, params["trunk"])


def emoji_tokens(grid, size):
  """Sequences of emoji in the embedded tokenizer's codes, int32 [I, N].

  The codes are taken modulo CODES, and rows and columns repeated or left out.
  """
  pipe = model_folder.load("emoji", extras=False)
  source = sources.open_source("emoji", "train", 128)
  images = np.stack([source[i]["image"] for i in range(size.images)])
  codes = pipe.encode_images(images) % CODES
  at = np.arange(size.side) * codes.shape[1] // size.side
  sequences = np.tile(np.maximum(grid.forced_tokens(CODES), 0),
                      (len(codes), 1)).astype(np.int32)
  sequences[:, grid.slot_of] = codes[:, at][:, :, at]
  return sequences


@dataclasses.dataclass
class Numbered(InMemory):
  """A published tensor whose numbers are their own places, from `first` on."""

  first: int = 0

  def read(self, start=0, stop=None):
    count = int(np.prod(self.shape))
    numbers = np.arange(self.first, self.first + count, dtype=np.float32)
    return numbers.reshape(self.shape)[start:stop]


def as_published(config, trunk, folder):
  """Tensors by published name that convert to this trunk.

  Converting numbered tensors says where each number goes; the trunk's numbers
  go the same ways back.
  """
  recipe = recipes.recipe(config)
  part = recipe.parts[0]
  found, first = {}, 1
  for source in (s for row in part.table.rows for s in row.sources):
    # Norms of heads have a row for each head, which is a known shape too.
    shape = max((source.shape, *source.others), key=np.prod)
    found[source.name] = Numbered(source.name, shape, first)
    first += int(np.prod(shape))
  assert first < 2**24  # float32 holds them all
  only = dataclasses.replace(recipe, parts=(part,), tokenizer=())
  convert.convert(
      convert.Job(only, (Checkpoint(found, ()),), (), "float32"), folder)
  places = checkpoints.restore(folder / "trunk")
  numbers = np.zeros(first, np.float32)
  jax.tree.map(
      lambda at, x: numbers.__setitem__(at.astype(int).ravel(), x.ravel()),
      dict(places), {name: trunk[name] for name in places})
  return {name: numbers[x.first:x.first + int(np.prod(x.shape))].reshape(
      x.shape) for name, x in found.items()}


def commands():
  """The page's commands, in order: (module, arguments)."""
  text = (ROOT / "docs" / "scale.md").read_text("utf-8")
  section = text.partition("## From nothing to Lumina's heads")[2]
  section = section.partition("\n## ")[0].replace("\\\n", " ")
  found = []
  for line in re.findall(r"python -m ((?:infer|train)\.[^&\n]*)", section):
    line = line.partition("#")[0].strip()
    line = line.rstrip('"') if line.count('"') % 2 else line
    module, *args = shlex.split(line)
    if module != "infer.plan":
      found.append((module, [_PLACES.get(arg, arg) for arg in args]))
  return found


def run(folder, module, args, processes=1, devices=2, kill_after=None):
  """Runs a command on processes of one job; returns their statuses.

  Args:
    folder: Working directory.
    module: Such as "train.mtp".
    args: Its arguments; the mesh is that of the devices, none for one process.
    processes: Number of processes.
    devices: Of each process.
    kill_after: Seconds after which one process is killed, or None.
  """
  args = list(args)
  if "--mesh" in args:
    at = args.index("--mesh")
    args[at:at + 2] = [] if processes == 1 else [
        "--mesh", f"data={processes},tensor={devices}"]
  if processes == 1:
    job = lambda _: []
  else:
    with socket.socket() as s:
      s.bind(("localhost", 0))
      address = f"localhost:{s.getsockname()[1]}"
    job = lambda i: ["--coordinator", address, "--num_processes",
                     str(processes), "--process_id", str(i)]
  devices = devices if processes > 1 else 1
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  logs = [open(folder / f"log_{i}.txt", "ab") for i in range(processes)]
  started = [subprocess.Popen(
      [sys.executable, "-m", module, *args, *job(i)], cwd=folder,
      env=environment, stdout=log, stderr=log) for i, log in enumerate(logs)]
  if kill_after is not None:
    stop = time.monotonic() + kill_after
    while time.monotonic() < stop and all(x.poll() is None for x in started):
      time.sleep(0.05)
    victim = random.choice(started)
    victim.send_signal(signal.SIGKILL)
  for process in started:
    try:
      process.wait(600)
    except subprocess.TimeoutExpired:
      process.kill()
      raise
  for log in logs:
    log.close()
  return [x.returncode for x in started]


def outcome(folder):
  """(tokens by split, heads, drafter if there is one) of a rehearsal."""
  work = folder / "runs" / "lumina_768"
  tokens = {}
  for shard in sorted(work.glob("mtp/tokens/*/tokens-*.npz")):
    with np.load(shard) as file:
      for image, row in zip(file["images"], file["tokens"], strict=True):
        key = shard.parent.name, int(image)
        assert key not in tokens, f"{key} is there twice"
        tokens[key] = row
  return tokens, *(
      checkpoints.restore(work / "model" / kind / "weights")
      for kind in ("heads", "drafter") if (work / "model" / kind).exists())


def leaves(tree):
  """The arrays of a checkpoint in float32."""
  return [np.asarray(x, np.float32) for x in jax.tree.leaves(tree)]


def compare(one, other, atol=1e-3):
  """Raises unless both rehearsals ended alike; returns the largest change."""
  (tokens, *parts), (others, *other_parts) = outcome(one), outcome(other)
  assert tokens.keys() == others.keys(), "an image is missing"
  for key, row in tokens.items():
    np.testing.assert_array_equal(row, others[key], err_msg=str(key))
  largest = max(float(np.abs(a - b).max()) for a, b in zip(
      leaves(parts), leaves(other_parts), strict=True))
  assert largest <= atol, largest
  return largest


def rehearse(
    folder, size, processes, kills, last, longest=90.0, leave_out=()
):
  """Runs the page's commands; trainings are killed and started again.

  Args:
    folder: A new folder.
    size: How large the model is.
    processes: Of a training that is killed.
    kills: Number of kills of each training.
    last: Processes of the start that ends a training.
    longest: Most seconds after which one is killed.
    leave_out: Words; commands with one of them are not run.
  """
  make(folder, size)
  for module, args in commands():
    if set(leave_out) & {module, *args}:
      continue
    is_training = module.startswith("train.")
    for number in range(kills if is_training else 0):
      seconds = random.uniform(longest / 6, longest)
      statuses = run(folder, module, args, processes, kill_after=seconds)
      print(module, f"kill {number + 1} after {seconds:.0f} s", statuses,
            flush=True)
    start = time.monotonic()
    count = last if is_training else 1
    statuses = run(folder, module, args, count)
    print(module, f"on {count}", statuses, f"{time.monotonic() - start:.0f} s",
          flush=True)
    assert statuses == [0] * count, module


def main(argv):
  """Rehearses alone, and with kills; compares."""
  del argv
  values = flags.FLAGS
  size = Size(values.side, values.images, values.trunk_steps, values.steps)
  folder = pathlib.Path(values.folder)
  random.seed(values.seed)
  run_all = functools.partial(rehearse, size=size)
  run_all(folder / "alone", processes=1, kills=0, last=1)
  run_all(folder / "killed", processes=4, kills=values.kills, last=2)
  print("the same images; heads and drafter differ by at most",
        compare(folder / "alone", folder / "killed"))


if __name__ == "__main__":
  flags.DEFINE_string("folder", None, "An empty folder.", required=True)
  flags.DEFINE_integer("side", 48, "Tokens per side.")
  flags.DEFINE_integer("images", 40, "Captions.")
  flags.DEFINE_integer("trunk_steps", 100, "Steps of the trunk.")
  flags.DEFINE_integer("steps", 12, "Steps of heads and drafter.")
  flags.DEFINE_integer("kills", 10, "Kills of each training.")
  flags.DEFINE_integer("seed", 0, "Of the kills.")
  app.run(main)
