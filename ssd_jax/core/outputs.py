"""Generated images and the statistics of their generation."""

import dataclasses

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Picture:
  """One generated image.

  Attributes:
    index: Index over the whole call; keys the image's noise.
    prompt: The prompt.
    image: uint8 [H, W, 3], pixels.
    tokens: int32 [R, C], image tokens.
    passes: Forward passes until the image was final.
    commit_pass: int32 [R, C], pass in which each token became final.
    preview: int32 [R, C], tokens of the grid that was generated first, or None.
  """

  index: int
  prompt: str
  image: np.ndarray
  tokens: np.ndarray
  passes: int
  commit_pass: np.ndarray
  preview: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Output:
  """B generated images, in the order of the prompts.

  Attributes:
    images: uint8 [B, H, W, 3], pixels; of 0 x 0 px if the tokens are not
      codes of pixels.
    tokens: int32 [B, R, C], image tokens.
    passes: int32 [B], forward passes per image.
    commit_pass: int32 [B, R, C], pass in which each token became final.
    prompts: The prompt of each image.
    history: int32 [B, passes, R, C], tokens and drafts after each pass, or
      None unless traced.
    notes: Warnings about the prompts.
    compile_seconds: Time spent compiling.
    seconds: Remaining time.
    index: int32 [B], index of each image over the whole call; keys its noise.
    preview: int32 [B, R, C], tokens of the grid that was generated first, whose
      passes count too; None if there is no such grid.
  """

  images: np.ndarray
  tokens: np.ndarray
  passes: np.ndarray
  commit_pass: np.ndarray
  prompts: tuple[str, ...]
  history: np.ndarray | None
  notes: tuple[str, ...]
  compile_seconds: float
  seconds: float
  index: np.ndarray
  preview: np.ndarray | None = None

  @property
  def pil_images(self) -> list[Image.Image]:
    """The images as PIL images."""
    return [Image.fromarray(image) for image in self.images]

  @property
  def pictures(self) -> list[Picture]:
    """The images as separate `Picture`s."""
    return [
        Picture(int(self.index[i]), self.prompts[i], self.images[i],
                self.tokens[i], int(self.passes[i]), self.commit_pass[i],
                None if self.preview is None else self.preview[i])
        for i in range(len(self.prompts))]
