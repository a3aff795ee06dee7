"""Names and shapes at full size are the originals'; nothing of it is made."""

import pytest
import torch
import transformers
from transformers.models.chameleon import modeling_chameleon

from ssd_jax import families
from ssd_jax.cli.convert import RECIPES
from tests.parity import torch_gpt, torch_vq, transformers_vq

_LEFT_OUT = ("codebook_used", "num_batches_tracked")


def chameleon():
  """transformers' own sizes of Chameleon-7B."""
  config = transformers.ChameleonConfig(vocabulary_map={"<image>": 8711})
  model = modeling_chameleon.ChameleonModel(config)
  del model.vqmodel
  head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
  return {f"model.{key}": x for key, x in model.state_dict().items()} | {
      "lm_head.weight": head.weight}


def janus(**sizes):
  """The language model of a size; what is not given is LlamaConfig's."""
  config = transformers.LlamaConfig(vocab_size=102400, **sizes)
  model = transformers.LlamaModel(config)
  return {f"language_model.model.{key}": x
          for key, x in model.state_dict().items()}


_TRUNKS = {
    "lumina:768": chameleon,
    "anole:hf": chameleon,
    "anole:native": lambda: torch_gpt.Anole(
        65536, 4096, 32, 32, 11008).state_dict(),
    "janus:1b": lambda: janus(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16),
    "janus:7b": lambda: janus(num_hidden_layers=30),
    "emu3:1:1": lambda: transformers.Emu3ForCausalLM(
        transformers.Emu3TextConfig()).state_dict(),
    "llamagen:c2i_3B_384": lambda: torch_gpt.LlamaGen(
        16384, 3200, 24, 32, 8704, 24, classes=1000).state_dict(),
    "llamagen:t2i_XL_256": lambda: torch_gpt.LlamaGen(
        16384, 1280, 36, 20, 3584, 16, slots=120, width=2048).state_dict(),
}
_TOKENIZERS = {  # where in the recipe, and whose tensors
    "llamagen:c2i_XL_384": (1, lambda: torch_vq.Tokenizer(
        128, (1, 1, 2, 2, 4), 2, 256, 16384, 8)),
    "llamagen:c2i_B_256_ds8": (1, lambda: torch_vq.Tokenizer(
        128, (1, 2, 2, 4), 2, 256, 16384, 8)),
    "lumina:768": (1, lambda: transformers_vq.Chameleon(
        128, (1, 1, 2, 2, 4), 2, 256, 8192, 256)),
    "janus:1b": (0, lambda: transformers_vq.Janus(
        128, (1, 1, 2, 2, 4), 2, 256, 16384, 8, 24)),
    "emu3:1:1": (1, lambda: transformers_vq.Emu3(
        256, (1, 2, 2, 4), 2, 4, 32768, 4)),
}


def expected(name, part, target):
  """Shapes that conversion takes, by published name."""
  family, _, variant = name.partition(":")
  config = getattr(families, family).get_config(variant)
  rows = RECIPES[family](config).parts[part].table.rows
  return {source.name: (source.shape, *source.others) for row in rows
          for source in row.sources if row.target.startswith(target)}


@pytest.mark.parametrize("name", _TRUNKS)
def test_trunks(name):
  """Conversion takes the trunk's tensors and no others."""
  with torch.device("meta"):
    theirs = {key: tuple(x.shape) for key, x in _TRUNKS[name]().items()}
  ours = expected(name, 0, "trunk/")
  if name.startswith("janus"):  # its image head has names of its own
    ours = {key: x for key, x in ours.items() if ".model." in key}
  assert ours.keys() == theirs.keys()
  assert all(shape in ours[key] for key, shape in theirs.items())


@pytest.mark.parametrize("name", _TOKENIZERS)
def test_tokenizers(name):
  """Conversion takes the image tokenizer's tensors and no others."""
  part, make = _TOKENIZERS[name]
  with torch.device("meta"):
    theirs = {key: tuple(x.shape) for key, x in make().tensors().items()
              if not key.endswith(_LEFT_OUT)}
  prefix = "gen_vision_model." if name.startswith("janus") else ""
  assert expected(name, part, "vq/") == {
      prefix + key: (shape,) for key, shape in theirs.items()}
