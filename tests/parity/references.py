"""The published families at toy size: by PyTorch, in the published layout.

Each class builds a small model whose weights their published names determine,
writes it to a folder as its authors published theirs, and computes logits
without a cache, one row at a time, with prompts of its own making.
"""

import argparse
import base64
import re

import torch
import transformers
from transformers.models.chameleon import modeling_chameleon

from tests.parity import (
  diffusers_vq,
  torch_cosmos,
  torch_gpt,
  torch_vq,
  transformers_vq,
)
from tests.parity.original_files import (
  fill,
  frozen,
  read_ids,
  renamed,
  tied_tensors,
  write_safetensors,
  write_shards,
  write_tokenizer,
)
from tests.support.toy_families import CONFIGS
from tests.support.toy_weights import CODES, DIM, HEADS, HIDDEN, LAYERS

TEXTS = ("a red cat", "the dog in the blue rain")
_PIECES = [bytes([i]) for i in range(256)] + [b"ca", b"cat", b"re", b"red"]


class Reference:
  """A toy model.

  Attributes:
    config: The same family's settings here; what conversion is reported.
    trunk: Its tensors by published name.
    tokenizer: Of images.
    rows, cols: The image in codes.
    row_ends: Whether a token of its own ends each row; it is CODES here.
    mult: Channel multipliers of the tokenizer of images.
    words: The file of the tokenizer of words.
  """

  name, words = "", "tokenizer.json"
  rows, cols, row_ends = 4, 4, False
  mult = (1, 2)

  def __init__(self):
    self.config = CONFIGS[self.name]()
    self.tokenizer = self.make_tokenizer()
    fill(self.vq_tensors())
    self.trunk = self.make_trunk()

  @property
  def length(self):
    """Tokens up to the last code."""
    return self.rows * (self.cols + self.row_ends) - self.row_ends

  def is_row_end(self, slot):
    """Whether the token there is no code."""
    return self.row_ends and (slot + 1) % (self.cols + 1) == 0

  def sequence(self, codes):
    """Tokens: the codes, row ends in their places."""
    return [CODES if self.is_row_end(slot) else int(code)
            for slot, code in enumerate(codes)]

  def make_tokenizer(self):
    return transformers_vq.Chameleon(32, self.mult, 1, 16, CODES, 8)

  def vq_tensors(self):
    return self.tokenizer.tensors()

  def ids(self, text):
    return read_ids(self.folder / self.words, text)

  def decode(self, codes):
    return self.tokenizer.decode(codes)

  def encode(self, pixels):
    return self.tokenizer.encode(pixels)


class Lumina(Reference):
  """transformers' Chameleon, image logits taken before they are masked."""

  name = "lumina"
  rows, cols, row_ends = 2, 6, True  # 96x32 px of 16 px cells
  mult = (1, 1, 1, 1, 2)
  norm_rows = 1

  def make_trunk(self):
    self.model = frozen(modeling_chameleon.ChameleonModel(
        transformers.ChameleonConfig(
            vocab_size=96, hidden_size=DIM, intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, vocabulary_map={"<image>": 95},
            vq_config=dict(
                base_channels=32, channel_multiplier=[1], num_embeddings=4,
                embed_dim=4, latent_channels=4))))
    del self.model.vqmodel
    tensors = renamed(self.model.state_dict(), "model.")
    norms = {name: x for name, x in tensors.items() if "_norm." in name}
    tensors |= {name: x[:self.norm_rows] for name, x in norms.items()}
    tensors["lm_head.weight"] = torch.zeros(96, DIM)
    fill(tensors)
    for name, x in norms.items():
      x.copy_(tensors[name].expand_as(x))
    return tensors

  def save(self, folder):
    self.folder = folder
    self._save_words(folder / "tokenizer.json")
    extra = {"loss.perceptual.weight": torch.ones(2)}
    torch.save({"state_dict": self.vq_tensors() | extra},
               folder / "vqgan.ckpt")
    write_shards(folder, self.trunk, "model", "safetensors")

  def _save_words(self, file):
    digits = str.maketrans("0123456789", "ABCDEFGHIJ")
    special = {"<s>": 0, "<racm3:break>": 37, "<reserved08799>": 40,
               "<reserved08706>": 41, "<reserved08800>": 42}
    special |= {f"IMGIMG{str(code).translate(digits)}Z": 4 + code
                for code in range(CODES)}
    others = set(range(60)) - set(special.values())
    write_tokenizer(file, special | {f"<{i}>": i for i in others})

  def prompt(self, text, conditional):
    grid = [37, 42 + 1, 42 + 3]  # 32 and 96 px
    if not conditional:
      return grid
    words = "Generate an image of 96x32 according to the following prompt:\n"
    return [0, *self.ids(words + text), 41, *grid]

  def logits(self, text, conditional, tokens):
    prompt = self.prompt(text, conditional)
    codes = [40 if t == CODES else t + 4 for t in tokens]
    hidden = self.model(torch.tensor([prompt + codes])).last_hidden_state[0]
    logits = hidden[len(prompt) - 1:] @ self.trunk["lm_head.weight"].T
    return logits[:, 4:4 + CODES].numpy()


class AnoleHF(Lumina):
  """The same trunk in the layout of a transformers fork, tokenizer inside."""

  name = "anole_hf"
  rows, cols, row_ends = 4, 4, False
  mult = (1, 2)
  norm_rows = HEADS

  def vq_tensors(self):
    return renamed(self.tokenizer.tensors(), "model.vqmodel.")

  def save(self, folder):
    self.folder = folder
    self._save_words(folder / "tokenizer.json")
    write_safetensors(folder / "model.safetensors",
                      self.trunk | self.vq_tensors())

  def prompt(self, text, conditional):
    return [0, *self.ids(text), 41, 37] if conditional else [0, 37]


class AnoleNative(AnoleHF):
  """Meta's layout: neighbouring pairs, one norm for all heads."""

  name, words = "anole", "text_tokenizer.json"

  def vq_tensors(self):
    return self.tokenizer.tensors()

  def make_trunk(self):
    self.model = frozen(torch_gpt.Anole(96, DIM, LAYERS, HEADS, HIDDEN))
    fill(self.model.state_dict())
    return self.model.state_dict()

  def save(self, folder):
    self.folder = folder / "tokenizer"
    self._save_words(self.folder / "text_tokenizer.json")
    torch.save({"state_dict": self.vq_tensors()}, self.folder / "vqgan.ckpt")
    (folder / "models" / "7b").mkdir(parents=True)
    torch.save(self.trunk | {"rope.freqs": torch.ones(8)},
               folder / "models" / "7b" / "consolidated.pth")

  def logits(self, text, conditional, tokens):
    prompt = self.prompt(text, conditional)
    ids = torch.tensor(prompt + [t + 4 for t in tokens])
    logits = self.model.logits(ids)[len(prompt) - 1:]
    return logits[:, 4:4 + CODES].numpy()


class Janus(Reference):
  """transformers' Janus, its tensors renamed to the published names."""

  name = "janus"
  start, pad, image = 60, 61, 62
  head_hidden = 48

  def make_tokenizer(self):
    return transformers_vq.Janus(32, self.mult, 1, 16, CODES, 8, self.cols)

  def vq_tensors(self):
    return renamed(self.tokenizer.tensors(), "gen_vision_model.")

  def make_trunk(self):
    self.model = model = frozen(transformers.JanusForConditionalGeneration(
        transformers.JanusConfig(
            text_config=dict(
                model_type="llama", vocab_size=64, hidden_size=DIM,
                intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, num_key_value_heads=HEADS,
                rms_norm_eps=1e-6),
            vision_config=dict(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                image_size=16, patch_size=16, projection_dim=DIM),
            vq_config=dict(
                embed_dim=8, num_embeddings=CODES, base_channels=32,
                channel_multiplier=[1, 2], num_res_blocks=1,
                latent_channels=16, projection_dim=DIM, num_patches=4,
                image_token_embed_dim=DIM)))).model
    # transformers ties two widths that the original keeps apart.
    head = model.generation_head
    head.proj_out = frozen(torch.nn.Linear(DIM, self.head_hidden))
    head.vision_head = frozen(torch.nn.Linear(self.head_hidden, CODES))
    tensors = renamed(model.language_model.state_dict(),
                      "language_model.model.")
    tensors["gen_embed.weight"] = model.generation_embeddings.weight.data
    aligner = model.generation_aligner
    for name, layer in (
        ("gen_aligner.layers.0", aligner.fc1),
        ("gen_aligner.layers.2", aligner.hidden_layers[0]),
        ("gen_head.output_mlp_projector", head.proj_out),
        ("gen_head.vision_head", head.vision_head)):
      tensors |= renamed(layer.state_dict(), f"{name}.")
    fill(tensors)
    return tensors

  def save(self, folder):
    self.folder = folder
    write_tokenizer(folder / "tokenizer.json", {
        "<｜begin▁of▁sentence｜>": self.start, "<｜▁pad▁｜>": self.pad,
        "<begin_of_image>": self.image})
    others = ("language_model.lm_head.weight", "aligner.layers.0.weight",
              "vision_model.vision_tower.norm.weight")
    unused = {name: torch.ones(3) for name in others}
    write_shards(folder, self.trunk | self.vq_tensors() | unused,
                 "pytorch_model", "bin")

  def prompt(self, text, conditional):
    words = self.ids(f"<|User|>: {text}\n\n<|Assistant|>:")
    middle = words if conditional else [self.pad] * len(words)
    return [self.start, *middle, self.image]

  def logits(self, text, conditional, tokens):
    prompt, model = self.prompt(text, conditional), self.model
    codes = torch.tensor(tokens, dtype=torch.long)
    x = torch.cat([
        model.language_model.embed_tokens(torch.tensor(prompt)),
        model.generation_aligner(model.generation_embeddings(codes))])
    hidden = model.language_model(inputs_embeds=x[None]).last_hidden_state[0]
    return model.generation_head(hidden[len(prompt) - 1:]).numpy()


class Emu3(Reference):
  """transformers' Emu3, its tokenizer's tensors renamed as published."""

  name = "emu3"
  rows, cols, row_ends = 2, 3, True
  mult = (1, 1, 2)

  def make_tokenizer(self):
    return transformers_vq.Emu3(32, self.mult, 1, 4, CODES, 4)

  def make_trunk(self):
    text = transformers.Emu3TextConfig(
        vocab_size=304 + CODES, hidden_size=DIM, intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=300,
        eos_token_id=301, rope_parameters=dict(
            rope_type="default", rope_theta=1_000_000.0))
    self.model = frozen(transformers.Emu3ForCausalLM(text))
    fill(self.model.state_dict())
    return self.model.state_dict()

  def save(self, folder):
    (folder / "emu3.tiktoken").write_bytes(b"".join(
        base64.b64encode(piece) + f" {i}\n".encode()
        for i, piece in enumerate(_PIECES)))
    names = ["image token", "image start"] + [
        f"visual token {code:06d}" for code in range(CODES)]
    (folder / "emu3_vision_tokens.txt").write_text(
        "".join(f"<|{name}|>\n" for name in names))
    write_shards(folder, self.trunk, "model", "safetensors")
    self.save_tokenizer(folder / "vision_tokenizer")

  def save_tokenizer(self, folder):
    write_safetensors(folder / "model.safetensors", self.vq_tensors())

  def ids(self, text):
    """Bytes, but for the four pieces that have ids of their own."""
    pieces = re.findall(rb"cat|red|ca|re|.", text.encode(), re.DOTALL)
    return [_PIECES.index(piece) for piece in pieces]

  def prompt(self, text, conditional):
    words = text + " in the rain" if conditional else "blue dog"
    return [300, *self.ids(words), 303, *b"2*3", 302]

  def logits(self, text, conditional, tokens):
    prompt = self.prompt(text, conditional)
    codes = [301 if t == CODES else t + 304 for t in tokens]
    logits = self.model(torch.tensor([prompt + codes])).logits[0]
    return logits[len(prompt) - 1:, 304:].numpy()


class Emu35(Emu3):
  """transformers' Qwen3 behind Emu3's text; IBQ's codes by dot products."""

  name = "emu3_5"
  mult = (1, 2)
  images = ()  # codes of those in the prompt

  def make_tokenizer(self):
    return torch_vq.IBQ(32, self.mult, 1, 16, CODES, 8)

  def make_trunk(self):
    self.model = frozen(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=304 + CODES, hidden_size=DIM, intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=24,
        num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters=dict(
            rope_type="default", rope_theta=1_000_000.0))))
    fill(self.model.state_dict())
    return self.model.state_dict()

  def save_tokenizer(self, folder):
    folder.mkdir()
    unused = {"loss.discriminator.weight": torch.ones(2)}
    torch.save({"state_dict": self.vq_tensors() | unused},
               folder / "model.ckpt")

  def prompt(self, text, conditional):
    task = "x2i" if len(self.images) else "t2i"
    before = f"You are a helpful assistant for {task} task. USER: "
    after = f"{text} ASSISTANT: "
    if not conditional:
      before, after = "You are a helpful assistant. USER: ", " ASSISTANT: "
    images = [token for grid in self.images for token in self.image(grid)]
    words = [*self.ids(before), *images, *self.ids(after)] if images else (
        self.ids(before + after))
    return [300, *words, 299, 303, *b"2*3", 302]

  def image(self, grid):
    """Ids of an image in a prompt: size, rows with ends between them, end."""
    rows = [[int(code) + 304 for code in row] for row in grid]
    found = [303, *b"%d*%d" % grid.shape, 302, *rows[0]]
    for row in rows[1:]:
      found += [301, *row]
    return [*found, 298]


class Lumina2(Reference):
  """transformers' Chameleon, diffusers' tokenizer with spatial norms."""

  name = "lumina2"
  row_ends = True
  mult = (1, 1, 1, 2)
  norm_rows, first_code = 1, 60
  make_trunk = Lumina.make_trunk

  def make_tokenizer(self):
    return diffusers_vq.MoVQ(32, self.mult, 1, 4, CODES, 4)

  def save(self, folder):
    self.folder = folder
    special = {"<|endoftext|>": 36, "<racm3:break>": 37,
               "<reserved08799>": 40, "<reserved08706>": 41,
               "<reserved08801>": 43}
    write_tokenizer(folder / "tokenizer.json", special)
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": null, "eos_token": {"content": "<|endoftext|>"}}')
    torch.save(self.vq_tensors(), folder / "movqgan_270M.ckpt")
    write_shards(folder, self.trunk, "model", "safetensors")

  def prompt(self, text, conditional):
    grid = [37, 43, 43]  # 32 px each
    if not conditional:
      return grid
    words = "Generate an image of 32x32 according to the following prompt:\n"
    return [36, *self.ids(words + text), 41, *grid]

  def logits(self, text, conditional, tokens):
    prompt = self.prompt(text, conditional)
    codes = [40 if t == CODES else t + self.first_code for t in tokens]
    hidden = self.model(torch.tensor([prompt + codes])).last_hidden_state[0]
    logits = hidden[len(prompt) - 1:] @ self.trunk["lm_head.weight"].T
    return logits[:, self.first_code:self.first_code + CODES].numpy()


class SimpleAR(Reference):
  """transformers' Qwen2 with a tied head; the tokenizer for whole clips."""

  name = "simplear"
  rows, cols = 2, 2
  mult = (1, 1, 2)
  first_added, first_code = 57, 64

  def make_tokenizer(self):
    return torch_cosmos.Tokenizer(32, self.mult, 1, 16, (8, 4), (1,))

  def make_trunk(self):
    self.model = frozen(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=self.first_code + CODES, hidden_size=DIM,
        intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, rms_norm_eps=1e-6,
        tie_word_embeddings=True, rope_parameters=dict(
            rope_type="default", rope_theta=1_000_000.0))))
    return tied_tensors(self.model)

  def save(self, folder):
    self.folder = folder
    added = ("t2i", "i2t", "soi", "vtokens", "t2v", "v2t", "sov")
    write_tokenizer(folder / "tokenizer.json", {
        f"<|{name}|>": self.first_added + i for i, name in enumerate(added)})
    self.tokenizer.save(folder, self.rows, self.cols)
    unused = {"model.mm_projector.0.weight": torch.ones(2, 2)}
    write_shards(folder, self.trunk | unused, "model", "safetensors")

  def prompt(self, text, conditional):
    words = "in the rain " + text if conditional else "blue dog"
    return [self.first_added, *self.ids(words), self.first_added + 2]

  def logits(self, text, conditional, tokens):
    prompt = self.prompt(text, conditional)
    codes = [t + self.first_code for t in tokens]
    logits = self.model(torch.tensor([prompt + codes])).logits[0]
    return logits[len(prompt) - 1:, self.first_code:].numpy()


class Liquid(Reference):
  """transformers' Gemma with a tied head, Chameleon's tokenizer."""

  name = "liquid"
  rows, cols = 3, 3
  first_code = 64

  def make_trunk(self):
    self.model = frozen(transformers.GemmaForCausalLM(transformers.GemmaConfig(
        vocab_size=self.first_code + CODES, hidden_size=DIM,
        intermediate_size=HIDDEN, num_hidden_layers=LAYERS, head_dim=24,
        num_attention_heads=HEADS, num_key_value_heads=HEADS,
        rms_norm_eps=1e-6, hidden_act="gelu")))
    return tied_tensors(self.model)

  def save(self, folder):
    self.folder = folder
    write_tokenizer(folder / "tokenizer.json", {
        "<bos>": 2, "<boi>": 7, "<eoi>": 8, "<unconditional>": 9})
    torch.save({"state_dict": self.vq_tensors()}, folder / "vqgan.ckpt")
    write_shards(folder, self.trunk, "model", "safetensors")

  def prompt(self, text, conditional):
    words = self.ids(text + " Generate an image based on this description.")
    return [2, *(words if conditional else [9]), 7]

  def logits(self, text, conditional, tokens):
    prompt = self.prompt(text, conditional)
    codes = [t + self.first_code for t in tokens]
    logits = self.model(torch.tensor([prompt + codes])).logits[0]
    return logits[len(prompt) - 1:, self.first_code:].numpy()


class LlamaGenClass(Reference):
  """LlamaGen for classes, in its own trainer's file."""

  name = "llamagen_class"
  mult = (1, 2, 2, 4)  # its tokenizer of 8 px cells

  def make_tokenizer(self):
    return torch_vq.Tokenizer(32, self.mult, 1, 16, CODES, 8)

  def make_trunk(self):
    self.model = frozen(torch_gpt.LlamaGen(
        CODES, DIM, LAYERS, HEADS, HIDDEN, 4, classes=10))
    fill(self.model.state_dict())
    return self.model.state_dict()

  def save(self, folder):
    torch.save({"model": self.trunk | {"freqs_cis": torch.ones(2)},
                "optimizer": {"state": {0: {"step": torch.ones(1)}}},
                "steps": 7, "args": argparse.Namespace(lr=1e-4, epochs=3)},
               folder / "c2i_B_256_ds8.pt")
    torch.save({"model": self.vq_tensors()}, folder / "vq_ds8_c2i.pt")

  def prompt(self, text, conditional):
    return [int(text) if conditional else 10]

  def logits(self, text, conditional, tokens):
    classes = self.model.cls_embedding.embedding_table
    condition = classes(torch.tensor(self.prompt(text, conditional)))
    return self.model.logits(condition, torch.ones(1).bool(), torch.tensor(
        tokens, dtype=torch.long)).numpy()


class LlamaGenText(Reference):
  """LlamaGen for captions, with transformers' T5 encoder."""

  name = "llamagen_text"
  slots, width = 12, 32

  def make_tokenizer(self):
    return torch_vq.Tokenizer(32, self.mult, 1, 16, CODES, 8)

  def make_trunk(self):
    self.t5 = frozen(transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=64, d_model=self.width, d_kv=8, d_ff=48, num_layers=2,
        num_heads=4, feed_forward_proj="gated-gelu")))
    fill({name: x for name, x in self.t5.state_dict().items()
          if name != "encoder.embed_tokens.weight"})
    self.model = frozen(torch_gpt.LlamaGen(
        CODES, DIM, LAYERS, HEADS, HIDDEN, 4, slots=self.slots,
        width=self.width))
    fill(self.model.state_dict())
    return self.model.state_dict()

  def save(self, folder):
    self.folder = folder
    torch.save(self.trunk, folder / "t2i_XL_stage1_256.pt")
    torch.save({"model": self.vq_tensors()}, folder / "vq_ds16_t2i.pt")
    write_tokenizer(folder / "tokenizer.json", {"<pad>": 0, "</s>": 1})
    unused = {"decoder.final_layer_norm.weight": torch.ones(2)}
    write_safetensors(folder / "model.safetensors",
                      self.t5.state_dict() | unused)

  def prompt(self, text, conditional):
    del conditional
    return [*self.ids(text), 1]

  def logits(self, text, conditional, tokens):
    ids = self.prompt(text, conditional)
    features = torch.zeros(self.slots, self.width)
    mask = torch.arange(self.slots) >= self.slots - len(ids)
    features[mask] = self.t5(torch.tensor([ids])).last_hidden_state[0]
    captions = self.model.cls_embedding
    condition = captions(
        features if conditional else captions.uncond_embedding)
    return self.model.logits(condition, mask, torch.tensor(
        tokens, dtype=torch.long)).numpy()


FAMILIES = {
    family.name: family for family in (
        Lumina, AnoleNative, AnoleHF, Janus, Emu3, Emu35, Lumina2, SimpleAR,
        Liquid,
        LlamaGenClass, LlamaGenText)
}
