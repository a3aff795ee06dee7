"""Protocols of model families and decoders.

`Family` is the interface of a family of checkpoints, `Decoder` that of a
decoding method. `FamilyBase` and `DecoderBase` hold defaults for the optional
parts; subclass `DecoderBase` to write a decoder of your own.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import (
  TYPE_CHECKING,
  Any,
  ClassVar,
  Protocol,
  Self,
  runtime_checkable,
)

import jax
import ml_collections
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Model, Params, Prompt, Queries

if TYPE_CHECKING:
  from ssd_jax.decoding.engine import Context
  from ssd_jax.models.generator import Generator
  from ssd_jax.models.vq import VQ


EncodePrompts = Callable[[Sequence[str], bool], tuple[Prompt, list[str]]]


class ImagePrompts(Protocol):
  """How a family reads prompts that contain images.

  Attributes:
    most: Largest number of images in a prompt.
  """

  @property
  def most(self) -> int:
    """Largest number of images in a prompt."""

  def size(self, width: int, height: int) -> tuple[int, int]:
    """Returns the (width, height) that an image is resized to, in pixels.

    Raises:
      UserError: if its sides differ too much.
    """

  def output_choices(self, width: int, height: int) -> dict[str, Any]:
    """Returns the settings with which generated images have such a size.

    Args:
      width: Width of a resized image, in pixels.
      height: Its height.
    """

  def encode_prompts(
      self, prompts: Sequence[str], guided: bool, images: Sequence[np.ndarray]
  ) -> tuple[Prompt, list[str]]:
    """Encodes texts and images as inputs of the trunk.

    Args:
      prompts: One text per image to generate.
      guided: Whether unconditional rows follow the conditional ones.
      images: Token grids of the images in each prompt, int32 [R, C] each.

    Returns:
      The prompts, and notes that the user should read.
    """


class Family(Protocol):
  """A family of checkpoints: its networks, its prompts and its defaults."""

  @property
  def name(self) -> str:
    """The name in model.json."""

  @property
  def config(self) -> ml_collections.ConfigDict:
    """The settings stored in model.json."""

  @property
  def sampling(self) -> Mapping[str, float]:
    """Default guidance, temperature, top_k and top_p."""

  @property
  def generator(self) -> "Generator":
    """The trunk bound to the image grid."""

  @property
  def vq(self) -> "VQ":
    """The image tokenizer."""

  def encode_prompts(
      self, prompts: Sequence[str], guided: bool
  ) -> tuple[Prompt, list[str]]:
    """Encodes texts as inputs of the trunk.

    Args:
      prompts: One text per image.
      guided: Whether unconditional rows follow the conditional ones.

    Returns:
      The prompts, and notes that the user should read.
    """

  def decode(self, vq_params: Params, tokens_BRC: jax.Array) -> jax.Array:
    """Returns uint8 images [B, H, W, 3] of token grids, int32 [B, R, C]."""

  def image_prompts(self) -> ImagePrompts:
    """Returns how prompts with images are read.

    Raises:
      UserError: if the family's prompts are text.
    """


class FamilyBase:
  """Defaults of a `Family`: prompts are text."""

  def image_prompts(self: Family) -> ImagePrompts:
    """Raises UserError, since the family's prompts are text."""
    hint = (" To keep an image's upper rows, use --complete FILE --rows N."
            if "vq" in self.config else "")
    raise UserError(f"Expected prompts of text alone for {self.name}, got an "
                    f"image.{hint}")


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a decoder needs of a model.

  Attributes:
    horizontal: Spatial heads that draft to the right.
    vertical: Spatial heads that draft the rows below.
    drafter: An EAGLE-style drafter.
    neighbours: Entries per token of the table of nearest codebook entries.
    preview: A preview, whose tokens are drafts of the image.
  """

  horizontal: bool = False
  vertical: bool = False
  drafter: bool = False
  neighbours: int = 0
  preview: bool = False

  def missing(self, model: Model) -> str:
    """Returns "heads", "drafter" or "preview" if `model` lacks it, else ""."""
    if (self.horizontal and not model.heads[0]) or (
        self.vertical and not model.heads[1]):
      return "heads"
    if self.preview and model.preview is None:
      return "preview"
    return "drafter" if self.drafter and model.drafter is None else ""


class DecoderState(Protocol):
  """What the engine reads of a decoder's state.

  A `flax.struct` dataclass of one image's arrays; in the engine's loop each
  has the batch as an axis in front.
  """

  @property
  def tokens(self) -> jax.Array:
    """Tokens of the slots, drafts included, int32 [N]."""

  @property
  def final(self) -> jax.Array:
    """Which tokens no later pass changes, bool [N]."""

  def replace(self, **changes: Any) -> Self:
    """Returns a copy with other arrays."""


@runtime_checkable
class Decoder(Protocol):
  """A frozen dataclass of static settings with pure functions.

  A decoder is written for ONE image; the engine maps it over the batch. It
  makes its own states, and takes no others: their class is its own.

  Attributes:
    name: The name on the command line.
  """

  name: ClassVar[str]
  __dataclass_fields__: ClassVar[dict[str, Any]]

  @property
  def lossless(self) -> bool:
    """Whether the output has AR sampling's joint distribution on every grid."""

  @property
  def has_fixed_passes(self) -> bool:
    """Whether all images of a grid take the same number of passes."""

  def is_lossless(self, grid: Grid) -> bool:
    """Returns whether the output has AR's joint distribution on this grid."""

  def needs(self, model: Model) -> Needs:
    """Returns what the decoder needs of `model` beside the trunk."""

  def scratch(self, model: Model) -> int:
    """Returns the number of cache slots beyond the sequence."""

  def start(
      self, ctx: "Context", p_V: jax.Array, hidden_GD: jax.Array
  ) -> DecoderState:
    """Returns the state after the prefill, which predicts slot 0."""

  def propose(self, ctx: "Context", state: Any) -> Queries:
    """Returns the slots to feed in this pass, with their drafts."""

  def resolve(
      self, ctx: "Context", state: Any, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> DecoderState:
    """Returns the state after a pass.

    Row i of `p_QV` is the target distribution of the slot after queries[i].
    """

  def settle(
      self, ctx: "Context", state: Any
  ) -> tuple[jax.Array, jax.Array] | None:
    """Returns which keys and values move after `resolve`, or None.

    A decoder that feeds the same slot several times in a pass (a tree) writes
    to scratch slots. What the pass wrote to slot source[i] is then copied to
    slot target[i]; a target of X drops it. M rows are touched, not the cache.

    Returns:
      (source, target), int32 [M] slots of one image; None if nothing ever
      moves.
    """


class DecoderBase:
  """Defaults of a `Decoder`: lossy, no needs, no scratch slots, nothing moves.

  A subclass is a frozen dataclass with a `name` and adds `start`, `propose` and
  `resolve`; a lossless one also sets `lossless = True`.
  """

  name: ClassVar[str]

  @property
  def lossless(self) -> bool:
    """Whether the output has AR sampling's joint distribution on every grid."""
    return False

  @property
  def has_fixed_passes(self) -> bool:
    """Whether all images of a grid take the same number of passes."""
    return False

  def is_lossless(self, grid: Grid) -> bool:
    """Returns whether the output has AR's joint distribution on this grid."""
    del grid
    return self.lossless

  def needs(self, model: Model) -> Needs:
    """Returns empty `Needs`: the trunk suffices."""
    del model
    return Needs()

  def scratch(self, model: Model) -> int:
    """Returns 0: all queries write to slots of the sequence."""
    del model
    return 0

  def settle(
      self, ctx: "Context", state: Any
  ) -> tuple[jax.Array, jax.Array] | None:
    """Returns None: all keys and values are already in their slots."""
    del ctx, state
    return None
