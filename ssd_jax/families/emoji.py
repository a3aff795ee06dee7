"""The embedded model: captions of a few words -> 128 px emoji on a 16x16 grid.

The prompt is a prefix of word ids; the unconditional stream is the empty
caption. Rotary positions are two-dimensional, with the caption in a row above
the image: tokens above and to the left of a token are then close to it,
whatever their distance in the sequence.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.core.config import check, from_config_dict
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import FamilyBase
from ssd_jax.core.types import Params, Prompt
from ssd_jax.families import training_defaults
from ssd_jax.models import rope
from ssd_jax.models.generator import Generator
from ssd_jax.models.transformer import TrunkConfig
from ssd_jax.models.vocabulary import Vocabulary
from ssd_jax.models.vq import VQ, VQConfig, to_uint8
from ssd_jax.storage import checkpoints, model_settings

THETA = 10_000.0


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the family's default settings; variants are "" and "smoke"."""
  if variant not in ("", "smoke"):
    raise ValueError(
        "Expected no variant of configs/emoji.py or 'smoke', got variant "
        f"{variant!r}. Remove what follows the colon."
    )
  c = ml_collections.ConfigDict
  config = c()
  config.family = "emoji"
  config.workdir = "runs/emoji"
  config.data = "emoji"  # or folder:PATH, tfds:NAME
  config.pixels = 128
  config.prompt_slots = 24
  config.vq = c(dict(
      ch=64, ch_mult=(1, 2), num_res_blocks=1, z_channels=64, n_codes=1024,
      code_dim=16, l2_norm=False, attn_levels=(), patch=4, groups=16,
      priced=True,
  ))
  config.trunk = c(dict(
      d_model=256, n_layers=6, n_heads=4, n_kv_heads=4, head_dim=64, d_ff=768,
      norm_eps=1e-5, qk_norm=True, interleaved=True,
  ))
  config.tokenizer = c(dict(
      optimizer=dict(learning_rate=1.5e-3, final_learning_rate=2e-5,
                     warmup_steps=150, b2=0.99, weight_decay=1e-4, ema=0.995),
      loop=dict(steps=2600, batch=8, log_every=10, eval_every=300,
                save_every=150),
      rate=0.1, continuous_steps=200, start_from="",
  ))
  config.ar = c(dict(
      optimizer=dict(kind="muon", learning_rate=2e-3, final_learning_rate=2e-5,
                     warmup_steps=100, b2=0.95, weight_decay=0.02, ema=0.998),
      loop=dict(steps=6000, batch=8, accumulate=1, log_every=10,
                eval_every=400, save_every=100),
      drop_caption=0.1, corrupt=0.3, start_from="", compute="float32",
  ))
  config.mtp = training_defaults.mtp(steps=1200, batch=8, vertical=2)
  config.mtp.optimizer.update(learning_rate=1e-3, warmup_steps=50)
  config.drafter = training_defaults.drafter(steps=1200, batch=8)
  config.drafter.optimizer.learning_rate = 1e-3
  # Model that heads and drafter are trained for; "" is WORKDIR/model.
  config.checkpoint = ""
  config.prompts_file = ""  # captions to use instead of the vendored ones
  config.num_prompts = 0  # largest number used for training; 0 uses all
  config.images_per_caption = 1
  config.sampling = c(dict(guidance=1.25, temperature=0.25, top_k=0, top_p=1.0))
  if variant == "smoke":  # for tests: trains in seconds on a CPU
    config.vq.update(ch=16, n_codes=64, z_channels=16, groups=4)
    config.trunk.update(d_model=32, n_layers=2, n_heads=2, n_kv_heads=2,
                        head_dim=16, d_ff=64)
    for part in (config.tokenizer, config.ar, config.mtp, config.drafter):
      part.loop.update(steps=6, batch=2, log_every=1, eval_every=6,
                       save_every=2)
      part.optimizer.warmup_steps = 2
    config.tokenizer.continuous_steps = 2
    config.mtp.heads.update(horizontal=2, vertical=1)
    config.mtp.eval_images = config.drafter.eval_images = 8
    config.drafter.depth = 2
  return config


def generator(
    trunk: ml_collections.ConfigDict, vq: VQConfig, pixels: int,
    words: Vocabulary,
) -> Generator:
  """Returns the trunk with its grid, positions and input table.

  The input table has rows for words, followed by rows for image tokens.

  Args:
    trunk: Settings of the trunk.
    vq: Config of the image tokenizer.
    pixels: Side of the image.
    words: Vocabulary of captions.
  """
  check(pixels > 0 and pixels % vq.downsample == 0, "pixels", pixels,
        f"a multiple of {vq.downsample}")
  check(words.length > 2, "prompt_slots", words.length, "at least 3")
  side = pixels // vq.downsample
  cfg = TrunkConfig(
      **trunk, vocab_in=words.size + vq.n_codes, vocab_out=vq.n_codes
  )
  return Generator(
      cfg, Grid(side, side),
      rope.table_2d(
          slot_positions(words.length, side, side), cfg.head_dim, THETA),
      words.size + np.arange(vq.n_codes, dtype=np.int32),
  )


def slot_positions(prompt_slots: int, rows: int, cols: int) -> np.ndarray:
  """Returns the (row, column) position of every slot, int [P + N, 2].

  Caption words are in row -2. The slot that begins the image is at the end of
  row -1, where the predecessor of position (0, 0) would be.
  """
  prompt = [(-2, j) for j in range(prompt_slots - 1)] + [(-1, cols - 1)]
  image = [(r, c) for r in range(rows) for c in range(cols)]
  return np.array(prompt + image)


@dataclasses.dataclass(frozen=True, eq=False)
class Emoji(FamilyBase):
  """The family of the embedded model.

  Attributes:
    config: Settings that the model was trained with.
    words: Vocabulary of captions.
  """

  config: ml_collections.ConfigDict
  words: Vocabulary

  name = "emoji"

  @functools.cached_property
  def vq(self) -> VQ:
    """The image tokenizer."""
    return VQ(from_config_dict(VQConfig, self.config.vq))

  @functools.cached_property
  def generator(self) -> Generator:
    """The trunk with its grid."""
    return generator(
        self.config.trunk, self.vq.cfg, self.config.pixels, self.words
    )

  @property
  def sampling(self) -> dict[str, float]:
    """Default guidance, temperature, top_k and top_p."""
    return self.config.sampling.to_dict()

  def decode(self, vq_params: Params, tokens_BRC: jax.Array) -> jax.Array:
    """Decodes image tokens to images, uint8 [B, H, W, 3]."""
    x: Any = self.vq.apply({"params": vq_params}, tokens_BRC, method="decode")
    return to_uint8(x)

  def encode_prompts(
      self, prompts: Sequence[str], guided: bool
  ) -> tuple[Prompt, list[str]]:
    """Encodes captions as inputs of the trunk.

    Args:
      prompts: One caption per image.
      guided: Whether to append unconditional rows.

    Returns:
      The encoded prompts, and notes for the user.
    """
    notes, rows = [], []
    for text in prompts:
      ids, is_cut = self.words.encode(text)
      if is_cut:
        notes.append(
            f"the prompt {text[:40]!r}... is longer than the "
            f"{self.words.length - 2} word ids the model reads; the rest is "
            "not used"
        )
      rows.append(self.words.pad(ids))
    if guided:
      rows += [self.words.pad([])] * len(prompts)
    slots = self.words.length + self.generator.grid.length
    positions = np.broadcast_to(np.arange(slots), (len(rows), slots))
    tokens, mask = (np.stack(x) for x in zip(*rows, strict=True))
    return Prompt(*map(jnp.asarray, (tokens, mask, positions))), notes


def write_settings(
    folder: pathlib.Path, config: ml_collections.ConfigDict, words: Vocabulary
) -> None:
  """Writes model.json.

  It contains the family's name, settings and vocabulary, and the identity of
  the image tokenizer that the trunk was trained with.
  """
  keep = ("pixels", "prompt_slots", "vq", "trunk", "sampling")
  settings = {k: v for k, v in config.to_dict().items() if k in keep}
  model_settings.write(
      folder / "model.json",
      {"family": "emoji", "config": settings, "words": " ".join(words.words),
       "tokenizer": checkpoints.identity(folder / "vq")},
  )


def from_settings(settings: dict) -> Emoji:
  """Returns the family described by a model.json."""
  config = ml_collections.ConfigDict(settings["config"])
  words = tuple(settings["words"].split(" "))
  return Emoji(config, Vocabulary(words, config.prompt_slots))
