"""What the published families share: prompts of token ids, files, sizes."""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.core.config import UserError, from_config_dict
from ssd_jax.core.extras import need
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Params, Prompt
from ssd_jax.core.weights import leaves_by_path
from ssd_jax.models import rope
from ssd_jax.models.generator import Generator
from ssd_jax.models.transformer import Trunk, TrunkConfig
from ssd_jax.models.vq import VQ, VQConfig, to_uint8

_BUCKETS = (32, 64, 128, 256, 512, 1024)  # prompt slots; one compile each
SAFETENSORS = ("model.safetensors.index.json", "*.safetensors")
ANY_FORMAT = (*SAFETENSORS, "pytorch_model.bin.index.json", "*.bin")
Ids = tuple[int, ...]
BYTE_IDS_NOTE = (
    "random weights come without a tokenizer: the prompt is spelled in bytes; "
    "--checkpoint DIR of a converted model brings its own")
CHAMELEON_VQ = ("**/vqgan.ckpt", "**/vqgan.safetensors")


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
  """A family of published checkpoints as a pipeline holds it.

  Attributes:
    config: What model.json holds.
    folder: Of the model, for its tokenizer; None with random weights that no
      folder belongs to: words are then spelled in bytes.
  """

  config: ml_collections.ConfigDict
  folder: pathlib.Path | None = None

  @property
  def name(self) -> str:
    """In model.json."""
    return self.config.family

  @functools.cached_property
  def vq(self) -> VQ:
    """The tokenizer of images."""
    return VQ(from_config_dict(VQConfig, self.config.vq))

  @functools.cached_property
  def trunk(self) -> TrunkConfig:
    """Sizes of the trunk."""
    return from_config_dict(TrunkConfig, self.config.trunk)

  @property
  def sampling(self) -> dict[str, float]:
    """Default guidance, temperature, top_k and top_p."""
    return self.config.sampling.to_dict()

  @functools.cached_property
  def grid(self) -> Grid:
    """The image as a sequence."""
    raise NotImplementedError

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """int32 [V + forced kinds], rows of the input table."""
    raise NotImplementedError

  @functools.cached_property
  def rope(self) -> np.ndarray:
    """The rotary table: one row per position."""
    positions = _BUCKETS[-1] + self.grid.length
    return rope.table_1d(positions, self.trunk.head_dim, self.config.theta)

  @functools.cached_property
  def generator(self) -> Generator:
    """The trunk with its grid."""
    is_cpu = jax.default_backend() == "cpu"
    return Generator(
        self.trunk, self.grid, self.rope, self.input_ids,
        jnp.float32 if is_cpu else jnp.bfloat16)

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """(conditional, unconditional) prompts of a text.

    Rows of the input table; the last one predicts the first cell.
    """
    raise NotImplementedError

  def encode_prompts(
      self, prompts: Sequence[str], guided: bool
  ) -> tuple[Prompt, list[str]]:
    """(prompts as the trunk takes them, what a user should know).

    Args:
      prompts: Texts.
      guided: Whether there are unconditional rows, after the others.
    """
    pairs = [self.streams(text) for text in prompts]
    rows = [pair[0] for pair in pairs]
    if guided:
      rows += [pair[1] for pair in pairs]
    notes = [BYTE_IDS_NOTE] if self.folder is None else []
    return left_padded(rows, self.grid.length), notes

  def decode(self, vq_params: Params, tokens_BRC: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3], the pictures of codes."""
    x: Any = self.vq.apply({"params": vq_params}, tokens_BRC, method="decode")
    return to_uint8(x)

  @functools.cached_property
  def text_tokenizer(self):
    """The checkpoint's own tokenizer of texts (`tokenizers.Tokenizer`)."""
    file = self.tokenizer_file(self.config.tokenizer)
    tokenizer = need("tokenizers", "text").Tokenizer.from_file(str(file))
    tokenizer.no_truncation()  # files may hold what a trainer had set
    tokenizer.no_padding()
    return tokenizer

  def tokenizer_file(self, name: str) -> pathlib.Path:
    """A file of the model's tokenizer."""
    file = (self.folder or pathlib.Path()) / "tokenizer" / name
    if not file.is_file():
      raise UserError("Expected the checkpoint's tokenizer, got a model "
                      f"folder without {file}. Convert it again.")
    return file

  def text_ids(self, text: str) -> list[int]:
    """Ids of a text, no special tokens added."""
    if self.folder is None:
      return byte_ids(text)
    return self.text_tokenizer.encode(text, add_special_tokens=False).ids


def byte_ids(text: str) -> list[int]:
  """A text in bytes: what stands for its ids where there is no tokenizer."""
  return list(text.encode())


def left_padded(rows: Sequence[Sequence[int]], slots: int) -> Prompt:
  """Prompts of any lengths, their last tokens side by side.

  Each row's positions start at 0 at its own first token.

  Args:
    rows: Ids of each row.
    slots: Slots N of the image.
  """
  longest = max(map(len, rows))
  if longest > _BUCKETS[-1]:
    raise UserError(f"Expected at most {_BUCKETS[-1]}, got a prompt of "
                    f"{longest} tokens. Shorten it.")
  length = next(n for n in _BUCKETS if n >= longest)
  tokens = np.zeros((len(rows), length), np.int32)
  mask = np.zeros((len(rows), length), bool)
  positions = np.zeros((len(rows), length + slots), np.int32)
  for i, ids in enumerate(rows):
    pad = length - len(ids)
    tokens[i, pad:] = ids
    mask[i, pad:] = True
    positions[i, pad:] = np.arange(length + slots - pad)
  return Prompt(*map(jnp.asarray, (tokens, mask, positions)))


def trunk_shapes(cfg: TrunkConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """The arrays of a trunk by path."""
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
  init = lambda x, cos_sin: Trunk(cfg).init(
      jax.random.key(0), x, cos_sin, jnp.ones((1, 1, 1), bool),
      method="init_all")
  variables = jax.eval_shape(
      init, shape(1, 1, cfg.d_model), shape(1, 1, cfg.head_dim // 2, 2))
  return leaves_by_path(variables["params"], "trunk")


def settings_of(
    config: ml_collections.ConfigDict, keep: Sequence[str]
) -> dict[str, Any]:
  """What model.json keeps of a configuration."""
  values = config.to_dict()
  return {"config": {key: values[key] for key in ("family", *keep)}}


def unknown_variant(name: str, variant: str, known: Sequence[str]) -> ValueError:
  """The error of an unknown variant of a configuration."""
  return ValueError(
      f"Expected one of {', '.join(known)}, got variant {variant!r} of "
      f"configs/{name}.py. Write it after the colon.")
