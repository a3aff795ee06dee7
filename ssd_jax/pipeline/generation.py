"""One call of `Pipeline.generate`, batch by batch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ssd_jax.core.protocols import Decoder, EncodePrompts
from ssd_jax.core.types import Prompt
from ssd_jax.decoding import engine
from ssd_jax.decoding.engine import Decoded
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.pipeline import completion, preview
from ssd_jax.pipeline.programs import Programs
from ssd_jax.pipeline.run import Run
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Clock, Progress


class Generated(NamedTuple):
  """Images of a batch, or of a call.

  Attributes:
    images: uint8 [B, H, W, 3].
    tokens: int32 [B, R, C].
    passes: int32 [B], forward passes per image, those of its preview included.
    commit_pass: int32 [B, R, C], pass in which each token became final.
    history: int32 [B, passes, R, C], or None.
    previews: int32 [B, r, c], tokens of the previews, or None.
  """

  images: np.ndarray
  tokens: np.ndarray
  passes: np.ndarray
  commit_pass: np.ndarray
  history: np.ndarray | None
  previews: np.ndarray | None

  @classmethod
  def join(cls, parts: Sequence["Generated"]) -> "Generated":
    """Returns the images of all batches of a call."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


class Generation:
  """Generates the batches of a call.

  Args:
    encode: Encodes prompts; see `Family.encode_prompts`.
    programs: Programs of whole images.
    decoder: Settings.
    settings: Settings of the target distribution.
    guided: Whether an unconditional stream runs too.
    seed: Seed of the call.
    trace: Whether to record the tokens after every pass.
    on_pass: Called after every pass, or None.
    given_rows: Rows that are given of each image.
  """

  def __init__(
      self, encode: EncodePrompts, programs: Programs, decoder: Decoder,
      settings: Sampling, guided: bool, seed: int, trace: bool,
      on_pass: Callable[[Progress], None] | None, given_rows: int,
  ):
    self._encode, self._programs, self._decoder = encode, programs, decoder
    self._settings, self._guided, self._seed = settings, guided, seed
    self._trace, self._on_pass = trace, on_pass
    self._run = Run(programs, decoder, given_rows)
    self._preview_run = None
    if programs.model.preview is not None:
      for name, value in (
          ("prefix", given_rows), ("trace", trace), ("on_pass", on_pass)):
        if value:
          preview.check_one_grid(programs.model.preview, name)
      self._preview_run = preview.run_of(self._run, programs)
    self._has_devices = on_pass is not None  # each of several would call it

  @property
  def clock(self) -> Clock:
    """Time spent compiling, and the rest."""
    return self._run.clock

  def __call__(
      self, texts: Sequence[str], index_B: np.ndarray,
      given_BRC: np.ndarray | None, count: int,
  ) -> tuple[Generated, list[str]]:
    """Generates a batch.

    Args:
      texts: The prompt of each image.
      index_B: Index of each image over the whole call.
      given_BRC: The rows that are given, int32 [B, rows, C], or None.
      count: Number of images that are wanted; the others fill the batch.

    Returns:
      The wanted images, and notes on their prompts.
    """
    prompt, notes = self._encode(texts, self._guided)
    first, prompt = self._preview(prompt, index_B)
    decoded = self._decode(prompt, index_B, given_BRC, count)
    passes, commit_pass = decoded.passes, decoded.commit_pass
    if first is not None:
      passes = passes + first.passes
      commit_pass = commit_pass + first.passes[:, None, None]
    images = sharding.fetch(
        self._run.decode_images(np.asarray(decoded.tokens)))
    batch = (images, decoded.tokens, passes, commit_pass, decoded.history,
             None if first is None else first.tokens)
    wanted = jax.tree.map(lambda x: np.asarray(x)[:count], batch)
    return Generated(*wanted), notes

  def _preview(
      self, prompt: Prompt, index_B: np.ndarray
  ) -> tuple[Decoded | None, Prompt]:
    """Generates the previews, if any, and lets the prompts end with them."""
    if self._preview_run is None:
      return None, prompt
    model = self._programs.model
    if self._decoder.needs(model).preview:
      prompt = preview.without_drafts(prompt)
    first = preview.generate(
        self._preview_run, prompt, self._settings, self._seed, index_B)
    return first, preview.extend(prompt, model, np.asarray(first.tokens))

  def _decode(
      self, prompt: Prompt, index_B: np.ndarray, given_BRC: np.ndarray | None,
      count: int,
  ) -> Decoded:
    """Returns the tokens of whole images, on the host."""
    run, listener = self._run, self._programs.listener
    prompt = run.prepare(prompt, given_BRC)
    if not self._has_devices:
      run.choose_devices(prompt, self._settings, len(index_B))
      self._has_devices = True
    with listener.forward_to(self._on_pass, count):
      decoded = run(
          engine.decode, run.place(prompt), self._settings,
          jax.random.key(self._seed), index_B, trace=self._trace,
          on_pass=listener if self._on_pass else None)
      return completion.join(given_BRC, sharding.fetch(decoded))
