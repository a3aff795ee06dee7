"""Names and shapes at full size are the originals'; nothing of it is made."""

import re

import pytest
import torch
import transformers
from transformers.models.chameleon import modeling_chameleon

from ssd_jax import families
from ssd_jax.convert.registry import RECIPES
from tests.parity import (
  diffusers_vq,
  torch_cosmos,
  torch_gpt,
  torch_vq,
  transformers_vq,
)

_LEFT_OUT = ("codebook_used", "num_batches_tracked")


def chameleon(**sizes):
  """transformers' own sizes of Chameleon-7B, but for the given ones."""
  config = transformers.ChameleonConfig(
      vocabulary_map={"<image>": 8711}, **sizes)
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


def qwen2(hidden, layers, heads, hidden_mlp):
  """A Qwen2.5 with SimpleAR's vocabulary."""
  return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
      vocab_size=215_672, hidden_size=hidden, intermediate_size=hidden_mlp,
      num_hidden_layers=layers, num_attention_heads=heads,
      num_key_value_heads=2, tie_word_embeddings=True)).state_dict()


def qwen3():
  """Emu3.5's sizes."""
  return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
      vocab_size=282_926, hidden_size=5120, intermediate_size=25_600,
      num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8,
      head_dim=128)).state_dict()


def glm_image():
  """GLM-Image's sizes; what is not given is transformers' own."""
  config = transformers.GlmImageConfig(text_config=dict(
      vocab_size=168_064, vision_vocab_size=16_512, hidden_size=4096,
      intermediate_size=13_696, num_hidden_layers=40, num_attention_heads=32,
      num_key_value_heads=2))
  tensors = transformers.GlmImageForConditionalGeneration(config).state_dict()
  return {key: x for key, x in tensors.items()
          if not key.startswith(("model.visual.", "model.vqmodel."))}


_TRUNKS = {
    "glm_image:": glm_image,
    "lumina2:768": lambda: chameleon(vocab_size=171_385),
    "simplear:0.5b": lambda: qwen2(896, 24, 14, 4864),
    "simplear:1.5b": lambda: qwen2(1536, 28, 12, 8960),
    "liquid:7b": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(vocab_size=264_192)).state_dict(),
    "emu3_5:4:3": qwen3,
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
    "simplear:0.5b": (1, lambda: torch_cosmos.Tokenizer(
        128, (2, 4, 4), 2, 16, (8, 8, 8, 5, 5, 5), (1,))),
    "lumina2:768": (1, lambda: diffusers_vq.MoVQ(
        256, (1, 2, 2, 4), 2, 4, 16384, 4)),
    "emu3_5:4:3": (1, lambda: torch_vq.IBQ(
        256, (1, 1, 2, 2, 4), 4, 256, 131_072, 256)),
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


def table_of(name, part):
  """The tensors of a part of a family's recipe."""
  family, _, variant = name.partition(":")
  config = getattr(families, family).get_config(variant)
  return RECIPES[family](config).parts[part].table


def expected(name, part, target):
  """Shapes that conversion takes, by published name."""
  rows = table_of(name, part).rows
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
  ignored = "|".join(table_of(name, part).ignored)
  with torch.device("meta"):
    theirs = {key: tuple(x.shape) for key, x in make().tensors().items()
              if not (key.endswith(_LEFT_OUT) or re.fullmatch(ignored, key))}
  prefix = "gen_vision_model." if name.startswith("janus") else ""
  assert expected(name, part, "vq/") == {
      prefix + key: (shape,) for key, shape in theirs.items()}
