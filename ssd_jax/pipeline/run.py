"""One call's use of a pipeline's programs, for `generate` and `stream`."""

from typing import Any

import jax
import numpy as np

from ssd_jax.core.protocols import Decoder
from ssd_jax.core.types import Prompt
from ssd_jax.decoding import continuous_batching
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.pipeline import completion
from ssd_jax.pipeline.programs import Programs
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Clock


class Run:
  """Runs programs of one decoder on the devices that share its batch.

  Args:
    programs: Programs of whole images.
    decoder: Settings.
    given_rows: Rows that are given of each image; see `completion`.

  Attributes:
    decoder: Settings.
    clock: Time spent compiling, and the rest.
  """

  def __init__(
      self, programs: Programs, decoder: Decoder, given_rows: int = 0
  ):
    self._whole = programs.model
    self._programs = programs.completing(given_rows)
    self.decoder = decoder
    self._mesh: jax.sharding.Mesh | None = None
    self.clock = Clock()

  def choose_devices(
      self, prompt: Prompt, settings: Sampling, batch: int
  ) -> None:
    """Shards a batch over CPU devices where that is faster.

    Otherwise, and before, the mesh that the user has set is used, if any.
    """
    self._mesh = self.clock.compile(
        self._programs.mesh_for, self.decoder, prompt, settings, batch)

  def prepare(self, prompt: Prompt, given_BRC: np.ndarray | None) -> Prompt:
    """Returns prompts with as many slots as the devices read at once.

    Args:
      prompt: Encoded prompts of B images.
      given_BRC: The given rows, int32 [B, rows, C], with which they end.
    """
    prompt = completion.extend(prompt, self._whole, given_BRC)
    return continuous_batching.widen(prompt, self._programs.prompt_slots(
        self.decoder, prompt.tokens.shape[1]))

  def place(self, prompt: Prompt) -> Prompt:
    """Returns the prompt with its rows on the devices that read them."""
    return sharding.shard_rows(prompt, self._mesh)

  def __call__(self, function: Any, *args: Any, **static: Any) -> Any:
    """Returns `function(model, decoder, params, *args, **static)`.

    The function is compiled when it first meets arguments of such shapes.
    """
    with sharding.use_mesh(self._mesh):
      args = (self._programs.params_for(self.decoder, self._mesh), *args)
      program = self.clock.compile(
          self._programs.compile, function, self.decoder, *args, **static)
      return program(*args)

  def decode_images(self, tokens: np.ndarray) -> jax.Array:
    """Returns the images uint8 [B, H, W, 3] of grids int32 [B, R, C].

    They are on the device, and may still be in the making.
    """
    return self._programs.decode_images(tokens, self.clock)
