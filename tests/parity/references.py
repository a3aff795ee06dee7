"""The published families at toy size: by PyTorch, in the published layout.

Each class builds a small random model, writes it to a folder as its authors
published theirs, and computes logits without a cache, one row at a time, with
prompts of its own making.
"""

import argparse
import base64
import json

import safetensors.torch
import tokenizers
import torch
import transformers
from transformers.models.chameleon import modeling_chameleon
from transformers.models.emu3 import modeling_emu3

import torch_gpt
import torch_vq
from ssd_jax.families import anole, emu3, janus, llamagen, lumina

CODES = 32
DIM, LAYERS, HEADS, HIDDEN = 64, 2, 4, 96
WORDS = ("a", "red", "blue", "cat", "dog", "in", "the", "rain")


def spread(model):
  """Weights large enough that logits differ; norms and biases not trivial."""
  with torch.no_grad():
    for name, p in model.named_parameters():
      if p.ndim == 1:
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.copy_(offset + 0.2 * torch.randn_like(p))
      elif p.ndim == 2:
        p.copy_(torch.randn_like(p) * 1.5 / p.shape[-1] ** 0.5)
  return model.eval().requires_grad_(False)


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
  return tokenizer


def write_shards(folder, tensors, kind):
  """Two shards and their index."""
  keys = sorted(tensors)
  names, index = [], {}
  stem, tail = {"safetensors": ("model", "safetensors"),
                "bin": ("pytorch_model", "bin")}[kind]
  for i, part in enumerate((keys[::2], keys[1::2])):
    names.append(f"{stem}-{i + 1:05d}-of-00002.{tail}")
    shard = {key: tensors[key].contiguous() for key in part}
    if kind == "safetensors":
      safetensors.torch.save_file(shard, folder / names[-1])
    else:
      torch.save(shard, folder / names[-1])
    index |= dict.fromkeys(part, names[-1])
  (folder / f"{stem}.{tail}.index.json").write_text(
      json.dumps({"metadata": {}, "weight_map": index}))


def tiny_trunk(config, vocab_in, kv=HEADS, head_hidden=0):
  config.trunk.update(
      d_model=DIM, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=kv,
      head_dim=DIM // HEADS, d_ff=HIDDEN, vocab_in=vocab_in, vocab_out=CODES)
  if head_hidden:
    config.trunk.head_hidden = head_hidden


def shrink_vq(config, levels, dim):
  sizes = dict(ch=32, ch_mult=(1,) * (levels - 1) + (2,), num_res_blocks=1,
               z_channels=16, n_codes=CODES, code_dim=dim)
  config.vq.update(**sizes)
  return sizes


def tiny_tokenizer(config, style, levels=2, dim=8):
  sizes = shrink_vq(config, levels, dim)
  if style == "raster":
    config.vq.attn_levels = (levels - 1,)
  return spread(torch_vq.Tokenizer(
      style, sizes["ch"], sizes["ch_mult"], 1, 16, CODES, dim))


class Lumina:
  """transformers' Chameleon, image logits taken before they are masked."""

  first, eol, image, turn, size = 4, 40, 37, 41, 42

  def __init__(self, rows=1):
    torch.manual_seed(0)
    self.config = config = lumina.get_config("768")
    config.target_size, config.size = 64, "96x32"
    config.ids.update(first_code=self.first, end_of_row=self.eol,
                      image=self.image, end_of_turn=self.turn, size=self.size)
    tiny_trunk(config, 96)
    self.tokenizer = tiny_tokenizer(config, "taming", levels=5)
    self.qk_rows = rows
    model = modeling_chameleon.ChameleonModel(transformers.ChameleonConfig(
        vocab_size=96, hidden_size=DIM, intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocabulary_map={"<image>": 95},
        vq_config=dict(base_channels=32, channel_multiplier=[1],
                       num_embeddings=4, embed_dim=4, latent_channels=4)))
    del model.vqmodel
    self.model = spread(model)
    for layer in self.model.layers:  # all heads alike, as published
      for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
        norm.weight.copy_(norm.weight[:1] * torch.ones(HEADS, 1)
                          if norm.weight.ndim == 2 else norm.weight)
        norm.weight.copy_(1 + 0.3 * torch.randn(1, DIM // HEADS))
        norm.bias.copy_(0.3 * torch.randn(1, DIM // HEADS))
    self.head = torch.randn(96, DIM) * 0.2

  def save(self, folder):
    self._save_tokenizers(folder)
    write_shards(folder, self._tensors(), "safetensors")

  def _save_tokenizers(self, folder):
    special = {"<s>": 0, f"<reserved0{8706}>": self.turn}
    special |= {f"IMG{i}": self.first + i for i in range(CODES)}
    special |= {f"<{i}>": i for i in (self.eol, self.image,
                                      *range(self.size, self.size + 9))}
    self.words = write_tokenizer(folder / "tokenizer.json", special)
    state = self.tokenizer.state_dict()
    torch.save({"state_dict": state | {"loss.perceptual.weight": torch.ones(2)}},
               folder / "vqgan.ckpt")

  def _tensors(self):
    tensors = {f"model.{name}": x for name, x in
               self.model.state_dict().items()}
    for name in [n for n in tensors if "_norm." in n and "self_attn" in n]:
      tensors[name] = tensors[name][:self.qk_rows].clone()
    return tensors | {"lm_head.weight": self.head}

  def prompt(self, text, conditional):
    grid = [self.image, self.size + 1, self.size + 3]
    if not conditional:
      return grid
    text = ("Generate an image of 96x32 according to the following prompt:\n"
            + text)
    return [0, *self.words.encode(text, add_special_tokens=False).ids,
            self.turn, *grid]

  def logits(self, text, conditional, tokens):
    prompt = self.prompt(text, conditional)
    codes = [self.eol if t == CODES else t + self.first for t in tokens]
    hidden = self.model(torch.tensor([prompt + codes])).last_hidden_state[0]
    logits = hidden[len(prompt) - 1:] @ self.head.T
    return logits[:, self.first:self.first + CODES].numpy()


class AnoleHF(Lumina):
  """The same trunk in the layout of a transformers fork, tokenizer inside."""

  def __init__(self):
    super().__init__(rows=HEADS)
    ids = self.config.ids
    self.config = config = anole.get_config("hf")
    config.ids, config.side = ids, 4
    tiny_trunk(config, 96)
    self.tokenizer = tiny_tokenizer(config, "taming")

  def save(self, folder):
    self._save_tokenizers(folder)
    (folder / "vqgan.ckpt").unlink()
    vq = {f"model.vqmodel.{name}": x
          for name, x in self.tokenizer.state_dict().items()}
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in (self._tensors() | vq).items()},
        folder / "model.safetensors")

  def prompt(self, text, conditional):
    if not conditional:
      return [0, self.image]
    words = self.words.encode(text, add_special_tokens=False).ids
    return [0, *words, self.turn, self.image]


class AnoleNative(AnoleHF):
  """Meta's layout: neighbouring pairs, one norm for all heads."""

  def __init__(self):
    super().__init__()
    ids = self.config.ids
    self.config = config = anole.get_config()
    config.ids, config.side = ids, 4
    tiny_trunk(config, 96)
    self.tokenizer = tiny_tokenizer(config, "taming")
    self.model = spread(torch_gpt.Anole(96, DIM, LAYERS, HEADS, HIDDEN))

  def save(self, folder):
    self.words = write_tokenizer(
        folder / "tokenizer" / "text_tokenizer.json", {"<s>": 0} | {
            f"<{i}>": i for i in range(1, 60)})
    torch.save({"state_dict": self.tokenizer.state_dict()},
               folder / "tokenizer" / "vqgan.ckpt")
    (folder / "models" / "7b").mkdir(parents=True)
    torch.save(self.model.state_dict() | {"rope.freqs": torch.ones(8)},
               folder / "models" / "7b" / "consolidated.pth")

  def logits(self, text, conditional, tokens):
    prompt = self.prompt(text, conditional)
    ids = torch.tensor(prompt + [t + self.first for t in tokens])
    logits = self.model.logits(ids)[len(prompt) - 1:]
    return logits[:, self.first:self.first + CODES].numpy()


class Janus:
  """transformers' Janus, its tensors renamed to the published names."""

  pad, image = 61, 62

  def __init__(self):
    torch.manual_seed(0)
    self.config = config = janus.get_config("1b")
    config.side = 4
    tiny_trunk(config, 64 + CODES, head_hidden=DIM)
    self.tokenizer = tiny_tokenizer(config, "raster")
    self.model = spread(transformers.JanusForConditionalGeneration(
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
                image_token_embed_dim=DIM))))

  def save(self, folder):
    special = {"<｜begin▁of▁sentence｜>": 60, "<｜▁pad▁｜>": self.pad,
               "<begin_of_image>": self.image}
    self.words = write_tokenizer(folder / "tokenizer.json", special)
    model = self.model.model
    tensors = {f"language_model.model.{name}": x for name, x in
               model.language_model.state_dict().items()}
    tensors |= {f"gen_vision_model.{name}": x for name, x in
                self.tokenizer.state_dict().items()}
    tensors |= {"gen_embed.weight": model.generation_embeddings.weight,
                "language_model.lm_head.weight": torch.ones(64, DIM),
                "vision_model.vision_tower.norm.weight": torch.ones(3),
                "aligner.layers.0.weight": torch.ones(3)}
    aligner, head = model.generation_aligner, model.generation_head
    for name, layer in (
        ("gen_aligner.layers.0", aligner.fc1),
        ("gen_aligner.layers.2", aligner.hidden_layers[0]),
        ("gen_head.output_mlp_projector", head.proj_out),
        ("gen_head.vision_head", head.vision_head)):
      tensors |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    write_shards(folder, tensors, "bin")

  def logits(self, text, conditional, tokens):
    words = self.words.encode(f"<|User|>: {text}\n\n<|Assistant|>:",
                              add_special_tokens=False).ids
    middle = words if conditional else [self.pad] * len(words)
    prompt = torch.tensor([60, *middle, self.image])
    model = self.model.model
    x = torch.cat([model.language_model.embed_tokens(prompt),
                   model.generation_aligner(model.generation_embeddings(
                       torch.tensor(tokens, dtype=torch.long)))])
    hidden = model.language_model(inputs_embeds=x[None]).last_hidden_state[0]
    return model.generation_head(hidden[len(prompt) - 1:]).numpy()


class Emu3:
  """transformers' Emu3, its tokenizer's tensors renamed as published."""

  def __init__(self):
    torch.manual_seed(0)
    self.config = config = emu3.get_config("3:2")
    config.area = 6 * 4 * 4  # 2 x 3 cells of 4 px
    self.ids = dict(start=300, end_of_row=301, image=302, begin_of_image=303,
                    first_code=304)
    config.ids.update(**self.ids)
    config.suffix, config.negative = " in the rain", "blue dog"
    tiny_trunk(config, 304 + CODES, kv=2)
    sizes = shrink_vq(config, 3, 4)
    config.vq.update(z_channels=4, attn_levels=(2,))
    self.model = spread(transformers.Emu3ForCausalLM(transformers.Emu3TextConfig(
        vocab_size=304 + CODES, hidden_size=DIM, intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=300,
        eos_token_id=301, rope_parameters=dict(
            rope_type="default", rope_theta=1_000_000.0))))
    self.vq = spread(modeling_emu3.Emu3VQVAE(transformers.Emu3VQVAEConfig(
        codebook_size=CODES, embed_dim=4, latent_channels=4, base_channels=32,
        channel_multiplier=list(sizes["ch_mult"]), num_res_blocks=1,
        attn_resolutions=[2], hidden_size=64)))
    for module in self.vq.modules():
      if isinstance(module, torch.nn.BatchNorm3d):
        module.running_mean.normal_(0, 0.2)
        module.running_var.uniform_(0.5, 2.0)
        module.weight.normal_(1, 0.2)

  def save(self, folder):
    lines = [bytes([i]) for i in range(256)] + [b"ca", b"cat", b"re", b"red"]
    (folder / "emu3.tiktoken").write_bytes(b"".join(
        base64.b64encode(word) + f" {i}\n".encode()
        for i, word in enumerate(lines)))
    (folder / "emu3_vision_tokens.txt").write_text("<|visual token 000000|>\n")
    write_shards(folder, self.model.state_dict(), "safetensors")
    (folder / "vision_tokenizer").mkdir()
    safetensors.torch.save_file(
        {published_emu3(name): self._as_conv(name, x)
         for name, x in self.vq.state_dict().items()},
        folder / "vision_tokenizer" / "model.safetensors")

  @staticmethod
  def _as_conv(name, x):
    x = x[..., None, None] if "_proj.weight" in name else x
    return x.contiguous().clone()

  def text_ids(self, text):
    ids = []
    for word in text.replace(" ", "\0 ").split("\0"):
      space, rest = word[:1] == " ", word.strip()
      ids += list(b" ") if space else []
      ids += {"cat": [257], "red": [259]}.get(rest, list(rest.encode()))
    return ids

  def logits(self, text, conditional, tokens):
    words = self.text_ids(text + " in the rain" if conditional else "blue dog")
    prompt = [300, *words, 303, *b"2*3", 302]
    codes = [301 if t == CODES else t + 304 for t in tokens]
    logits = self.model(torch.tensor([prompt + codes])).logits[0]
    return logits[len(prompt) - 1:, 304:].numpy()

  def decode(self, ids):
    return self.vq.decode(ids)

  def encode(self, pixels):
    sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
    return torch.stack(self.vq.encode(pixels, sizes).image_tokens)


def published_emu3(name):
  """The published name of a tensor of transformers' Emu3 tokenizer."""
  for ours, theirs in (
      (".down_block.down.", ".down."), (".up_block.up.", ".up."),
      (".middle_block.", ".mid."), ("attn_norms.", "attn_norms_"),
      (".q_proj.", ".q."), (".k_proj.", ".k."), (".v_proj.", ".v."),
      (".out_proj.", ".proj_out."), ("mid.attn_norm.", "mid.attn_1.norm.")):
    name = name.replace(ours, theirs)
  if "attn_norms_" in name:
    head, _, tail = name.partition("attn_norms_")
    index, _, rest = tail.partition(".")
    name = f"{head}attn.{index}.norm.{rest}"
  return name


class LlamaGenClass:
  """LlamaGen for classes, from its own trainer's file."""

  def __init__(self):
    torch.manual_seed(0)
    self.config = config = llamagen.get_config("c2i_B_256")
    config.classes, config.side = 10, 4
    tiny_trunk(config, 11 + CODES)
    self.tokenizer = tiny_tokenizer(config, "raster")
    self.model = spread(torch_gpt.LlamaGen(
        CODES, DIM, LAYERS, HEADS, HIDDEN, 4, classes=10))

  def save(self, folder):
    torch.save({"model": self.model.state_dict() | {"freqs_cis": torch.ones(2)},
                "optimizer": {"state": {0: {"step": torch.ones(1)}}},
                "steps": 7, "args": argparse.Namespace(lr=1e-4, epochs=3)},
               folder / "c2i_B_256.pt")
    torch.save({"model": self.tokenizer.state_dict()},
               folder / "vq_ds16_c2i.pt")

  def logits(self, text, conditional, tokens):
    index = torch.tensor([int(text) if conditional else 10])
    condition = self.model.cls_embedding.embedding_table(index)
    return self.model.logits(condition, torch.ones(1).bool(), torch.tensor(
        tokens, dtype=torch.long)).numpy()


class LlamaGenText:
  """LlamaGen for captions, with transformers' T5 encoder."""

  slots, width = 12, 32

  def __init__(self):
    torch.manual_seed(0)
    self.config = config = llamagen.get_config("t2i_XL_256")
    config.side = 4
    tiny_trunk(config, CODES)
    config.trunk.update(caption_dim=self.width, caption_slots=self.slots)
    config.t5.update(d_model=self.width, n_layers=2, n_heads=4, head_dim=8,
                     d_ff=48, vocab=64)
    self.tokenizer = tiny_tokenizer(config, "raster")
    self.model = spread(torch_gpt.LlamaGen(
        CODES, DIM, LAYERS, HEADS, HIDDEN, 4, slots=self.slots,
        width=self.width))
    self.t5 = spread(transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=64, d_model=self.width, d_kv=8, d_ff=48, num_layers=2,
        num_heads=4, feed_forward_proj="gated-gelu")))

  def save(self, folder):
    torch.save(self.model.state_dict(), folder / "t2i_XL_stage1_256.pt")
    torch.save({"model": self.tokenizer.state_dict()},
               folder / "vq_ds16_t2i.pt")
    self.words = write_tokenizer(folder / "tokenizer.json",
                                 {"<pad>": 0, "</s>": 1})
    tensors = {name: x.contiguous().clone()
               for name, x in self.t5.state_dict().items()}
    tensors["decoder.final_layer_norm.weight"] = torch.ones(2)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")

  def logits(self, text, conditional, tokens):
    ids = [*self.words.encode(text, add_special_tokens=False).ids, 1]
    features = torch.zeros(self.slots, self.width)
    mask = torch.arange(self.slots) >= self.slots - len(ids)
    features[mask] = self.t5(torch.tensor([ids])).last_hidden_state[0]
    captions = self.model.cls_embedding
    condition = captions(
        features if conditional else captions.uncond_embedding)
    return self.model.logits(condition, mask, torch.tensor(
        tokens, dtype=torch.long)).numpy()


for family in (Lumina, Janus, LlamaGenClass, LlamaGenText):
  family.decode = lambda self, ids: self.tokenizer.decode(ids)
  family.encode = lambda self, pixels: self.tokenizer.encode(pixels)

FAMILIES = {
    "lumina": Lumina, "anole": AnoleNative, "anole_hf": AnoleHF,
    "janus": Janus, "emu3": Emu3, "llamagen_class": LlamaGenClass,
    "llamagen_text": LlamaGenText,
}
