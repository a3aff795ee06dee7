"""Base class of published families: prompts of token ids, files and sizes."""

import abc
from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.core.config import UserError, check, from_config_dict
from ssd_jax.core.extras import need
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import FamilyBase
from ssd_jax.core.types import Params, Prompt
from ssd_jax.core.weights import leaves_by_path
from ssd_jax.models import rope
from ssd_jax.models.generator import Generator
from ssd_jax.models.transformer import Trunk, TrunkConfig
from ssd_jax.models.vq import VQ, VQConfig, to_uint8, to_uint8_rounded

_BUCKETS = (32, 64, 128, 256, 512, 1024)  # prompt slots, compiled once each
SAFETENSORS = ("model.safetensors.index.json", "*.safetensors")
ANY_FORMAT = (*SAFETENSORS, "pytorch_model.bin.index.json", "*.bin")
Ids = tuple[int, ...]
_SAMPLE = "a red fox in the snow"
BYTE_IDS_NOTE = (
    "random weights have no text tokenizer, so prompts are encoded as bytes; "
    "pass --checkpoint DIR of a converted model to use its tokenizer")
CHAMELEON_VQ = ("**/vqgan.ckpt", "**/vqgan.safetensors")


@dataclasses.dataclass(frozen=True, eq=False)
class Published(FamilyBase, abc.ABC):
  """Base class of families of published checkpoints.

  Attributes:
    config: Settings stored in model.json.
    folder: Model folder with the text tokenizer; None with random weights, for
      which prompts are encoded as bytes.
    rounds_pixels: Whether the authors round pixels; others truncate.
    longest_prompt: Largest number of prompt tokens.
  """

  rounds_pixels: ClassVar[bool] = False
  longest_prompt: ClassVar[int] = _BUCKETS[-1]

  config: ml_collections.ConfigDict
  folder: pathlib.Path | None = None

  @property
  def name(self) -> str:
    """Name of the family in model.json."""
    return self.config.family

  @functools.cached_property
  def vq(self) -> VQ:
    """The image tokenizer."""
    return VQ(from_config_dict(VQConfig, self.config.vq))

  @functools.cached_property
  def trunk(self) -> TrunkConfig:
    """Sizes and options of the trunk."""
    return from_config_dict(TrunkConfig, self.config.trunk)

  @property
  def sampling(self) -> dict[str, float]:
    """Default guidance, temperature, top_k and top_p."""
    return self.config.sampling.to_dict()

  @property
  @abc.abstractmethod
  def grid(self) -> Grid:
    """The image as a sequence."""

  @property
  @abc.abstractmethod
  def input_ids(self) -> np.ndarray:
    """Rows of the input table of image and forced tokens, int32 [V + kinds]."""

  @functools.cached_property
  def rope(self) -> np.ndarray:
    """The rotary table, with one row per position."""
    positions = self.longest_prompt + self.grid.length
    return rope.table_1d(positions, self.trunk.head_dim, self.config.theta)

  @functools.cached_property
  def generator(self) -> Generator:
    """The trunk with its grid."""
    is_cpu = jax.default_backend() == "cpu"
    rows = self.trunk.vocab_in
    for name, value in self.config.get("ids", {}).items():
      check(0 <= value < rows, f"ids.{name}", value, f"in [0, {rows})")
    ids = self.input_ids
    check(ids.max() < rows, "ids of image tokens", f"up to {ids.max()}",
          f"below the {rows} rows of the input table")
    return Generator(
        self.trunk, self.grid, self.rope, ids,
        jnp.float32 if is_cpu else jnp.bfloat16)

  @abc.abstractmethod
  def encode_prompts(
      self, prompts: Sequence[str], guided: bool
  ) -> tuple[Prompt, list[str]]:
    """Encodes texts as inputs of the trunk.

    Args:
      prompts: One text per image.
      guided: Whether to append unconditional rows.

    Returns:
      The encoded prompts, and notes for the user.
    """

  def decode(self, vq_params: Params, tokens_BRC: jax.Array) -> jax.Array:
    """Decodes image tokens to images, uint8 [B, H, W, 3]."""
    x: Any = self.vq.apply({"params": vq_params}, tokens_BRC, method="decode")
    return to_uint8_rounded(x) if self.rounds_pixels else to_uint8(x)

  @functools.cached_property
  def text_tokenizer(self):
    """The checkpoint's text tokenizer (`tokenizers.Tokenizer`)."""
    library = need("tokenizers", "text")
    file = self.tokenizer_file(self.config.tokenizer)
    try:
      tokenizer = library.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower type
      raise damaged_tokenizer(file, error) from error
    tokenizer.no_truncation()  # files may contain settings of a trainer
    tokenizer.no_padding()
    return tokenizer

  def tokenizer_file(self, name: str) -> pathlib.Path:
    """Returns the path of a file of the model's text tokenizer.

    Raises:
      UserError: The file is missing.
    """
    file = (self.folder or pathlib.Path()) / "tokenizer" / name
    if not file.is_file():
      raise UserError("Expected a model folder with the checkpoint's text "
                      f"tokenizer, got a folder without {file}. Convert it "
                      "again.")
    return file

  @abc.abstractmethod
  def check_text(self) -> None:
    """Raises UserError unless the tokenizer's files spell a text."""

  def _check_ids(self, ids: Sequence[int], rows: int) -> None:
    """Raises UserError for ids beyond the rows of a table of embeddings."""
    if max(ids) >= rows:
      raise UserError(
          f"Expected a tokenizer with ids below {rows}, got one that encodes "
          f"{_SAMPLE!r} with id {max(ids)}. Take the checkpoint's own.")

  def text_ids(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens."""
    if self.folder is None:
      return byte_ids(text)
    tokenizer = self.text_tokenizer
    try:
      return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises no narrower type
      file = self.tokenizer_file(self.config.tokenizer)
      raise damaged_tokenizer(file, error) from error


class PromptedByIds(Published):
  """Base class of families whose prompts are ids of the input table."""

  @abc.abstractmethod
  def streams(self, text: str) -> tuple[Ids, Ids]:
    """Returns the conditional and the unconditional prompt of a text.

    Both are ids of the input table; the last id predicts the first image token.
    """

  def encode_prompts(
      self, prompts: Sequence[str], guided: bool
  ) -> tuple[Prompt, list[str]]:
    """Encodes texts as inputs of the trunk; see `Published`."""
    return self.padded(list(map(self.streams, prompts)), guided)

  def padded(
      self, pairs: Sequence[tuple[Ids, Ids]], guided: bool
  ) -> tuple[Prompt, list[str]]:
    """Returns prompts of ids, and notes for the user.

    Args:
      pairs: The conditional and the unconditional prompt of each image.
      guided: Whether to append unconditional rows.

    Raises:
      UserError: A prompt is too long.
    """
    rows = [pair[0] for pair in pairs]
    if guided:
      rows += [pair[1] for pair in pairs]
    notes = [BYTE_IDS_NOTE] if self.folder is None else []
    return left_padded(rows, self.grid.length, self.longest_prompt), notes

  def check_text(self) -> None:
    """Raises UserError unless the tokenizer's files spell a text."""
    self._check_ids([*self.streams(_SAMPLE)[0]], self.trunk.vocab_in)


class SquareAfterText(PromptedByIds):
  """Base class of families of square images without end-of-row tokens.

  In the input table the image tokens follow those of the text.
  """

  @functools.cached_property
  def grid(self) -> Grid:
    """A square grid without end-of-row tokens."""
    return Grid(self.config.side, self.config.side)

  @property
  def text_rows(self) -> int:
    """Number of rows of the input table for text."""
    return self.trunk.vocab_in - self.trunk.vocab_out

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """Rows of image tokens, which follow those of the text."""
    image = np.arange(self.trunk.vocab_out)
    return (self.text_rows + image).astype(np.int32)


def damaged_tokenizer(file: pathlib.Path, error: Exception) -> UserError:
  """Returns the error for a file of a text tokenizer that cannot be read."""
  reason = " ".join(str(error).split())[:120] or type(error).__name__
  return UserError(
      f"Expected a file of the text tokenizer, got a damaged {file} "
      f"({reason}). Download it again, and convert again.")


def byte_ids(text: str) -> list[int]:
  """Returns a text's bytes, used as ids if there is no tokenizer."""
  return list(text.encode())


def left_padded(
    rows: Sequence[Sequence[int]], slots: int, most: int = _BUCKETS[-1]
) -> Prompt:
  """Pads prompts on the left, so that their last tokens are aligned.

  Each row's positions start at 0 at its own first token.

  Args:
    rows: Ids of each row.
    slots: Number of slots N of the image.
    most: Largest number of tokens of a prompt.

  Raises:
    UserError: A prompt is too long.
  """
  longest = max(map(len, rows))
  if longest > most:
    raise UserError(f"Expected a prompt of at most {most} tokens, got a prompt "
                    f"of {longest} tokens. Shorten it.")
  largest = _BUCKETS[-1]
  length = next((n for n in _BUCKETS if n >= longest),
                -(-longest // largest) * largest)
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
  """Returns the shapes of a trunk's arrays by path."""
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
  """Returns the settings of a configuration that model.json stores.

  Args:
    config: The configuration.
    keep: Keys to store.
  """
  values = config.to_dict()
  return {"config": {key: values[key] for key in ("family", *keep)}}


def unknown_variant(
    name: str, variant: str, known: Sequence[str]
) -> ValueError:
  """Returns the error for an unknown variant of a configuration."""
  return ValueError(
      f"Expected a variant of configs/{name}.py, one of {', '.join(known)}, "
      f"got variant {variant!r}. Write it after the colon.")
