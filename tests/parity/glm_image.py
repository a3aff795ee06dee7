"""GLM-Image at toy size: transformers' own model, written as published."""

import torch
import transformers

from tests.parity.original_files import (
  fill,
  frozen,
  read_ids,
  write_shards,
  write_tokenizer,
)
from tests.support.toy_weights import CODES, DIM, HEADS, HIDDEN, LAYERS

LARGE, PREVIEW = (2, 3), (1, 2)  # rows, columns of 96 x 64 px
_ROPE = dict(rope_type="default", rope_theta=10_000.0,
             partial_rotary_factor=0.5, mrope_section=[1, 1, 2])




class Reference:
  """A toy model."""

  def __init__(self):
    ids = dict(image_token_id=CODES + 70, image_start_token_id=CODES,
               image_end_token_id=CODES + 1)
    settings = transformers.GlmImageConfig(
        text_config=dict(
            vocab_size=CODES + 80, vision_vocab_size=CODES + 8,
            hidden_size=DIM, intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=2, rope_parameters=_ROPE,
            pad_token_id=CODES + 2, eos_token_id=CODES + 1, rms_norm_eps=1e-5),
        vision_config=dict(depth=1, hidden_size=16, num_heads=2,
                           intermediate_size=16, patch_size=16, image_size=64),
        vq_config=dict(embed_dim=8, num_embeddings=CODES, latent_channels=16),
        **ids)
    self.model = frozen(
        transformers.GlmImageForConditionalGeneration(settings))
    fill(self.model.state_dict())

  def save(self, folder):
    """Writes the folder of the encoder and that of the processor."""
    self.words = folder / "processor" / "tokenizer.json"
    special = {f"<dit{i}>": i for i in range(CODES)}
    special |= {"<|dit_token_16384|>": CODES, "<end>": CODES + 1,
                "<pad>": CODES + 2, "<sop>": CODES + 3,
                "<eop>": CODES + 4}
    write_tokenizer(self.words, special)
    where = folder / "vision_language_encoder"
    where.mkdir()
    write_shards(where, self.model.state_dict(), "model", "safetensors")

  def prompt(self, text):
    """Ids of a prompt."""
    sizes = "<sop>2 3<eop><sop>1 2<eop><|dit_token_16384|>"
    return read_ids(self.words, text + sizes)

  def logits(self, prompt, tokens):
    """Logits of every image token, positions written out."""
    start = len(prompt)
    places = [(n, n, n) for n in range(start)]
    places += [(start, start, start + c) for c in range(2)]
    start += 2
    places += [(start, start + r, start + c)
               for r in range(2) for c in range(3)]
    ids = torch.tensor([[*prompt, *tokens]])
    position_ids = torch.tensor(places[:ids.shape[1]]).T[:, None]
    out = self.model(input_ids=ids, position_ids=position_ids)
    return out.logits[0, len(prompt) - 1:, :CODES].numpy()

  def greedy(self, prompt):
    """Tokens of both grids by the model's own generate."""
    self.model.model.rope_deltas = None
    grids = torch.tensor([[1, *LARGE], [1, *PREVIEW]])
    out = self.model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        image_grid_thw=grids, images_per_sample=torch.tensor([2]),
        do_sample=False, max_new_tokens=8,
        suppress_tokens=list(range(CODES, CODES + 8)))
    return out[0, len(prompt):].tolist()
