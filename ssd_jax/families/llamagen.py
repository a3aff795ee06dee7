"""LlamaGen (Sun et al. 2024, arXiv:2406.06525), class- or text-conditional.

The grid has no end-of-row tokens; rotary positions are two-dimensional. Sine
and cosine are zero at condition slots, so keys vanish there and all visible
condition slots have equal attention logits.
"""

from collections.abc import Sequence
import functools
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.core.config import UserError, from_config_dict
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Params, Prompt
from ssd_jax.families import captions, published, training_defaults
from ssd_jax.families.janus import vq16
from ssd_jax.families.published import Published
from ssd_jax.models import rope
from ssd_jax.models.t5 import T5Config, T5Encoder
from ssd_jax.storage import checkpoints

_SIZES = {  # layers, heads, width
    "B": (12, 12, 768), "L": (24, 16, 1024), "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536), "3B": (24, 32, 3200),
}
_STAGES = {"t2i_XL_256": "t2i_XL_stage1_256", "t2i_XL_512": "t2i_XL_stage2_512"}
VARIANTS = (
    *(f"c2i_{size}_{pixels}" for pixels in (256, 384) for size in _SIZES),
    *_STAGES)
_FINE = "_ds8"  # suffix of variants whose image tokens cover 8 px
_CODES = 16_384
_END = "</s>"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns settings of a published checkpoint; "" is "c2i_XL_384".

  The suffix "_ds8" of a class-conditional variant selects the published
  tokenizer with 8 px per token, for trunks trained on it; none is published.
  """
  variant = variant or "c2i_XL_384"
  is_fine = variant.startswith("c2i") and variant.endswith(_FINE)
  base = variant.removesuffix(_FINE) if is_fine else variant
  if base not in VARIANTS:
    raise published.unknown_variant("llamagen", variant, VARIANTS)
  kind, size, pixels = base.split("_")
  layers, heads, width = _SIZES[size]
  config = ml_collections.ConfigDict()
  config.family = "llamagen"
  config.workdir = f"runs/llamagen_{variant}"
  config.file = f"{_STAGES.get(variant, variant)}.pt"
  config.classes = 1000 if kind == "c2i" else 0
  conditions = config.classes + 1 if config.classes else 0
  config.trunk = ml_collections.ConfigDict(dict(
      d_model=width, n_layers=layers, n_heads=heads, n_kv_heads=heads,
      head_dim=width // heads, d_ff=-(-(8 * width // 3) // 256) * 256,
      vocab_in=conditions + _CODES, vocab_out=_CODES, norm_eps=1e-5,
      interleaved=True, caption_dim=0 if config.classes else 2048,
      caption_slots=0 if config.classes else 120))
  config.vq = vq16()
  if is_fine:
    config.vq.update(ch_mult=(1, 2, 2, 4), attn_levels=(3,))
  pixels_per_token = 8 if is_fine else 16
  config.vq_file = f"vq_ds{pixels_per_token}_{kind}.pt"
  config.t5 = ml_collections.ConfigDict()
  config.theta = 10_000.0
  config.side = int(pixels) // pixels_per_token  # image tokens
  config.tokenizer = "" if config.classes else "tokenizer.json"
  # The published code treats scales below 1 as 1; here they weaken the prompt.
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=4.0, temperature=1.0, top_k=2000, top_p=1.0) if config.classes
      else dict(guidance=7.5, temperature=1.0, top_k=1000, top_p=1.0))
  training_defaults.add(config, prompts=60_000, batch=4 * 128)
  if config.classes:  # as many images, evenly distributed over the classes
    config.prompts_file, config.num_prompts = "", 0
    config.images_per_caption = 60_000 // config.classes
  return config


class LlamaGen(Published):
  """The LlamaGen family."""

  rounds_pixels = True

  @functools.cached_property
  def grid(self) -> Grid:
    """A square grid without end-of-row tokens."""
    return Grid(self.config.side, self.config.side)

  @property
  def condition_slots(self) -> int:
    """Number of prompt slots: 1 for a class, or those of a caption."""
    return self.trunk.caption_slots or 1

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """Rows of image tokens, which follow those of the classes."""
    first = self.trunk.vocab_in - self.trunk.vocab_out
    return (first + np.arange(self.trunk.vocab_out)).astype(np.int32)

  @functools.cached_property
  def rope(self) -> np.ndarray:
    """The rotary table: zeros for condition slots, then the image tokens."""
    side = self.config.side
    row_col = np.moveaxis(np.mgrid[:side, :side], 0, -1).reshape(-1, 2)
    image = rope.table_2d(row_col, self.trunk.head_dim, self.config.theta)
    zeros = np.zeros((self.condition_slots, *image.shape[1:]), np.float32)
    return np.concatenate([zeros, image])

  def encode_prompts(
      self, prompts: Sequence[str | int], guided: bool
  ) -> tuple[Prompt, list[str]]:
    """Encodes prompts as inputs of the trunk.

    Args:
      prompts: Class numbers; or captions, or .npy files of their features.
      guided: Whether to append unconditional rows.

    Returns:
      The encoded prompts, and notes for the user.

    Raises:
      UserError: A prompt is invalid.
    """
    if self.config.classes:
      return self._classes(prompts, guided), []
    texts = [str(prompt) for prompt in prompts]
    given = [text.endswith(".npy") for text in texts]
    if any(given) and not all(given):
      raise UserError("Expected prompts of one kind, got files of features and "
                      "captions. Generate them in two calls.")
    shape = (len(prompts), self.condition_slots, self.trunk.caption_dim)
    if all(given):
      features, mask, notes = captions.read_features(texts, shape)
    elif self.folder is None:
      features, mask, notes = captions.random_features(texts, shape)
    else:
      encode = functools.partial(self._encode_text, self._text_params)
      ids, mask, notes = self._caption_ids(texts)
      features = np.asarray(encode(ids, mask))
    return self.from_features(features, mask, guided), notes

  def _classes(self, prompts: Sequence[str | int], guided: bool) -> Prompt:
    none = self.config.classes
    rows = []
    for prompt in prompts:
      text = str(prompt).strip()
      if not text.isdecimal() or int(text) >= none:
        raise UserError(f"Expected a class from 0 to {none - 1}, got class "
                        f"{prompt!r}.")
      rows.append(int(text))
    rows += [none] * len(rows) if guided else []
    tokens = np.array(rows, np.int32)[:, None]
    return Prompt(jnp.asarray(tokens), jnp.ones(tokens.shape, bool),
                  self._positions(len(rows)))

  def _positions(self, rows: int) -> jax.Array:
    slots = self.condition_slots + self.grid.length
    return jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows, slots))

  def from_features(
      self, features_BTE: np.ndarray, mask_BT: np.ndarray, guided: bool
  ) -> Prompt:
    """Encodes captions given by features of a text encoder.

    Captions end at the last condition slot. Unconditional rows have the masks
    of their conditional rows.

    Args:
      features_BTE: float [B, T, E], with T at most the condition slots.
      mask_BT: bool [B, T], which features exist; these come first.
      guided: Whether to append unconditional rows.
    """
    slots = self.condition_slots
    batch, length, width = features_BTE.shape
    features = np.zeros((batch, slots, width), features_BTE.dtype)
    mask = np.zeros((batch, slots), bool)
    for i in range(batch):
      count = int(mask_BT[i, :length].sum())
      features[i, slots - count:] = features_BTE[i, :count]
      mask[i, slots - count:] = True
    tokens = np.zeros((batch, slots), np.int32)
    if guided:
      null = np.broadcast_to(1 + np.arange(slots, dtype=np.int32), mask.shape)
      tokens = np.concatenate([tokens, null])
      mask = np.concatenate([mask, mask])
      features = np.concatenate([features, np.zeros_like(features)])
    return Prompt(jnp.asarray(tokens), jnp.asarray(mask),
                  self._positions(len(tokens)), jnp.asarray(features))

  def check_text(self) -> None:
    """Raises UserError unless the tokenizer's files spell a text."""
    ids = self.text_ids("a red fox") + [self._end]
    self._check_ids(ids, self.config.t5.vocab)

  def _caption_ids(
      self, prompts: Sequence[str]
  ) -> tuple[np.ndarray, np.ndarray, list[str]]:
    slots = self.condition_slots
    ids = np.zeros((len(prompts), slots), np.int32)
    notes = []
    for i, prompt in enumerate(prompts):
      cleaned = captions.clean(str(prompt))
      words = self.text_ids(cleaned)
      if not cleaned:
        notes.append(f"nothing is left of the prompt {prompt[:40]!r} after the "
                     "cleaning of LlamaGen's captions, which drops Chinese, "
                     "links and file names; the image does not depend on it")
      if len(words) > slots - 1:
        notes.append(f"the prompt {prompt[:40]!r}... is longer than the "
                     f"{slots - 1} tokens the model reads; the rest is not "
                     "used")
      words = [*words[:slots - 1], self._end]
      ids[i, :len(words)] = words
    return ids, ids != 0, notes

  @functools.cached_property
  def _end(self) -> int:
    """Id that ends a caption."""
    end = self.text_tokenizer.token_to_id(_END)
    if end is None:
      raise UserError(
          f"Expected T5's tokenizer, got a tokenizer without {_END!r}. "
          "Convert again with flan-t5-xl's tokenizer.json.")
    return end

  @functools.cached_property
  def _encode_text(self):
    """Jitted (params, ids [B, T], mask [B, T]) -> features [B, T, E]."""
    encoder = T5Encoder(from_config_dict(T5Config, self.config.t5))
    return jax.jit(lambda params, ids, mask: encoder.apply(
        {"params": params}, ids, mask))

  @functools.cached_property
  def _text_params(self) -> Params:
    if self.folder is None or not (self.folder / "text").is_dir():
      raise UserError(
          "Expected a model folder with a text encoder, got "
          f"{self.folder} without a text encoder. Pass prompts FILE.npy with "
          "features, or convert with --text_encoder.")
    params = checkpoints.restore(self.folder / "text")
    return checkpoints.cast(params, self.generator.dtype)


def from_settings(settings: dict, folder: pathlib.Path | None) -> LlamaGen:
  """Returns the family described by a model.json."""
  return LlamaGen(ml_collections.ConfigDict(settings["config"]), folder)
