"""Tensors and tokenizers, written in the layouts of the originals' files."""

import json

import safetensors.torch
import tokenizers
import torch

from tests.support.toy_weights import toy

WORDS = ("a", "red", "blue", "cat", "dog", "in", "the", "rain")


def fill(tensors):
  """Gives tensors the numbers that their names determine, in place."""
  for name, x in tensors.items():
    if x.is_floating_point():
      x.copy_(torch.from_numpy(toy(name, tuple(x.shape))))


def frozen(model):
  """The model without dropout and gradients."""
  return model.eval().requires_grad_(False)


def tied_tensors(model):
  """Fills a model whose head is its input table; a save omits the head."""
  tensors = dict(model.state_dict())
  del tensors["lm_head.weight"]
  fill(tensors)
  return tensors


def renamed(tensors, prefix="", suffix=""):
  """Tensors with longer names."""
  return {f"{prefix}{name}{suffix}": x for name, x in tensors.items()}


def write_tokenizer(file, special):
  """A tokenizer of whole words; unknown ones share an id."""
  vocab = dict(special)
  free = (i for i in range(10**6) if i not in set(special.values()))
  for word in ("<unk>", *WORDS):
    vocab[word] = next(free)
  model = tokenizers.models.WordLevel(vocab, unk_token="<unk>")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(list(special))
  file.parent.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(file))


def read_ids(file, text):
  """Ids of a text by a tokenizer file."""
  tokenizer = tokenizers.Tokenizer.from_file(str(file))
  return tokenizer.encode(text, add_special_tokens=False).ids


def write_safetensors(file, tensors):
  """One file."""
  file.parent.mkdir(parents=True, exist_ok=True)
  safetensors.torch.save_file(
      {name: x.contiguous().clone() for name, x in tensors.items()}, file)


def write_shards(folder, tensors, stem, tail):
  """Two shards and their index."""
  keys, index = sorted(tensors), {}
  for i, part in enumerate((keys[::2], keys[1::2])):
    name = f"{stem}-{i + 1:05d}-of-00002.{tail}"
    shard = {key: tensors[key] for key in part}
    if tail == "safetensors":
      write_safetensors(folder / name, shard)
    else:
      torch.save(shard, folder / name)
    index |= dict.fromkeys(part, name)
  (folder / f"{stem}.{tail}.index.json").write_text(
      json.dumps({"metadata": {}, "weight_map": index}))
