"""The pipeline: a loaded model that generates images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import os
import pathlib
from typing import Any, Unpack

import flax.core
import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.outputs import Output
from ssd_jax.core.protocols import Decoder, EncodePrompts, Family
from ssd_jax.core.types import Model, Params
from ssd_jax.decoding import sampling as sampling_lib
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.sampling import Overrides, Sampling
from ssd_jax.models.vq import to_float
from ssd_jax.pipeline import arguments, image_prompts, preview, saving
from ssd_jax.pipeline.generation import Generated, Generation
from ssd_jax.pipeline.programs import Programs
from ssd_jax.pipeline.run import Run
from ssd_jax.pipeline.stream import Stream, StreamRequest
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Clock, Progress


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A model family with parameters.

  Attributes:
    family: Encodes prompts and decodes token grids into images; holds the
      networks and the default sampling.
    params: {"trunk": ..., and where available "heads": ..., "drafter": ...}.
      Immutable: `with_params` makes another pipeline.
    vq_params: Parameters of the image tokenizer, or None.
    model: The network's functions.
    folders: The folders that "model", "heads" and "drafter" came from.
  """

  family: Family
  params: Params
  vq_params: Params
  model: Model
  folders: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    object.__setattr__(self, "params", flax.core.freeze(self.params))
    if self.vq_params is not None:
      object.__setattr__(self, "vq_params", flax.core.freeze(self.vq_params))

  def with_params(self, **parts: Params) -> "Pipeline":
    """Returns a pipeline with some parts of the parameters replaced.

    Args:
      **parts: `trunk`, `heads` or `drafter`, shaped as this pipeline's.

    Raises:
      UserError: if a part is not one of this pipeline's, or has other shapes.
    """
    for name, part in parts.items():
      arguments.check_part(name, part, self.params)
    return dataclasses.replace(self, params={**self.params, **parts})

  @functools.cached_property
  def programs(self) -> Programs:
    """What was compiled for this pipeline."""
    return Programs(self.family, self.params, self.vq_params, self.model)

  @property
  def image_shape(self) -> tuple[int, ...]:
    """The (height, width, 3) of an image."""
    grid = self.model.grid
    tokens = jax.ShapeDtypeStruct((1, grid.rows, grid.cols), jnp.int32)
    return jax.eval_shape(self.family.decode, self.vq_params, tokens).shape[1:]

  def generate(
      self,
      prompts: Sequence[str],
      decoder: Decoder | str = AR(),
      *,
      num_images: int = 1,
      seed: int = 0,
      batch: int = 8,
      trace: bool = False,
      on_batch: Callable[[int], None] | None = None,
      on_pass: Callable[[Progress], None] | None = None,
      first_image: int | Sequence[int] = 0,
      prefix: np.ndarray | None = None,
      images: Sequence[image_prompts.Given] = (),
      **sampling: Unpack[Overrides],
  ) -> Output:
    """Generates `num_images` images for each prompt.

    Args:
      prompts: Any number of texts.
      decoder: Such as `ssd_jax.SSD(rounds=1)` or "ssd:rounds=1", or one of
        your own; see `ssd_jax.DecoderBase`.
      num_images: Images per prompt.
      seed: The same seed gives the same images, however the call is batched.
      batch: Images decoded together.
      trace: Whether to return the tokens after every pass too.
      on_batch: Called with the number of images finished.
      on_pass: Called after every pass with a `Progress`; the loop does not wait
        for it. Calls that have one take turns.
      first_image: Index of the first image, for a call that is one part of a
        larger one; or the index of each.
      prefix: The first rows of the grid, int32 [rows, C] for all images or
        [I, rows, C]; the images are completed, by lossless decoders as AR
        would.
      images: Images that each prompt contains, for families that read them:
        files, images of Pillow or arrays uint8 [H, W, 3]. The output has the
        pipeline's size; `load(..., images=images)` chooses it.
      **sampling: guidance, temperature, top_k or top_p instead of the family's.

    Raises:
      UserError: if a number is out of range or there is no prompt.
    """
    arguments.check_call(prompts, num_images, seed, batch, on_batch=on_batch,
                         on_pass=on_pass)
    texts = arguments.texts_of(prompts, num_images)
    settings, guided = self.sampling(**sampling)
    batch = sharding.even_batch(min(batch, len(texts)), 1 + guided)
    decoder = arguments.decoder_of(decoder)
    index_I = arguments.indices_of(first_image, len(texts), batch)
    given_IRC = arguments.prefix_of(
        prefix, self.model.grid, self.model.vocab, len(texts), batch)
    encode = self.prompt_encoder(images)
    given_rows = 0 if given_IRC is None else given_IRC.shape[1]
    check(not (given_rows and on_pass), "on_pass", on_pass,
          "None with a prefix")
    generate = Generation(
        encode, self.programs, decoder, settings, guided, seed, trace,
        on_pass, given_rows)
    padded = texts + texts[-1:] * (-len(texts) % batch)
    parts, notes = [], []
    for start in range(0, len(texts), batch):
      here, count = slice(start, start + batch), len(texts[start:start + batch])
      part, new_notes = generate(
          padded[here], index_I[here],
          None if given_IRC is None else given_IRC[here], count)
      parts.append(part)
      notes += [note for note in new_notes if note not in notes]
      if on_batch:
        on_batch(count)
    found = Generated.join(parts)
    return Output(
        found.images, found.tokens, found.passes, found.commit_pass,
        tuple(texts), found.history, tuple(notes), generate.clock.compiling,
        generate.clock.rest(), index_I[:len(texts)], found.previews)

  def stream(
      self,
      prompts: Iterable[str],
      decoder: Decoder | str = AR(),
      *,
      num_images: int = 1,
      seed: int = 0,
      batch: int = 8,
      on_step: Callable[[float], None] | None = None,
      first_image: int | Sequence[int] = 0,
      images: Sequence[image_prompts.Given] = (),
      **sampling: Unpack[Overrides],
  ) -> Stream:
    """Returns the images that `generate` makes, one by one as they finish.

    Continuous batching: a finished image frees its slot for the next prompt.
    Prompts are read as slots become free.

    Args:
      prompts: Any number of texts; may be endless.
      decoder: As for `generate`, like all that follow.
      num_images: Images per prompt.
      seed: The same seed gives the same images.
      batch: Images decoded together.
      on_step: Called every few passes with the images finished since the last
        call, in fractions; they add up to the number of images.
      first_image: Index of the first image; or the index of each.
      images: Images that each prompt contains.
      **sampling: guidance, temperature, top_k or top_p instead of the family's.

    Raises:
      UserError: if a number is out of range or there is no prompt.
    """
    preview.check_one_grid(self.model.preview, "stream")
    arguments.check_call(prompts, num_images, seed, batch, on_step=on_step)
    settings, guided = self.sampling(**sampling)
    decoder = arguments.decoder_of(decoder)
    if isinstance(prompts, Sequence):
      count = len(prompts) * num_images
      first_image = arguments.indices_of(first_image, count, 1).tolist()
      batch = min(batch, count)
    batch = sharding.even_batch(batch, 1 + guided)
    encode = self.prompt_encoder(images)
    return Stream(Run(self.programs, decoder), encode, StreamRequest(
        map(arguments.text_of, prompts), num_images, seed, batch, first_image,
        settings, guided, on_step))

  def prompt_encoder(
      self, images: Sequence[image_prompts.Given]
  ) -> EncodePrompts:
    """Returns what encodes prompts that contain images, or text alone."""
    if not image_prompts.count(images):
      return self.family.encode_prompts
    resized = image_prompts.resized(self.family, images)
    self._check_encoder()
    grids = [np.asarray(self._encode(self.vq_params, jnp.asarray(x[None])))[0]
             for x in resized]
    return functools.partial(
        self.family.image_prompts().encode_prompts, images=grids)

  def sampling(self, **overrides: Unpack[Overrides]) -> tuple[Sampling, bool]:
    """Returns (target distribution's settings, whether guidance is used)."""
    values: dict[str, Any] = dict(self.family.sampling)
    unknown = set(overrides) - set(values)
    if unknown:
      raise UserError(f"Expected a setting of {sorted(values)}, got "
                      f"{min(unknown)!r}.")
    values |= {k: v for k, v in overrides.items() if v is not None}
    arguments.check_sampling(values)
    return Sampling.make(**values), values["guidance"] != 1.0

  def num_queries(
      self, decoder: Decoder, prompts: Sequence[str],
      **sampling: Unpack[Overrides],
  ) -> int:
    """Returns the slots that a pass feeds for one image, idle ones included.

    Nothing is computed, but what the decoder needs of the model is checked.

    Args:
      decoder: Settings.
      prompts: The texts of a batch.
      **sampling: As for `generate`.

    Raises:
      UserError: if the model cannot run the decoder.
    """
    settings, guided = self.sampling(**sampling)
    prompt, _ = self.family.encode_prompts(list(prompts), guided)
    if self.model.preview is not None:
      prompt = preview.without_drafts(prompt)
    return self.programs.num_queries(decoder, prompt, settings, len(prompts))

  def log_prob(
      self, tokens: np.ndarray, prompts: Sequence[str],
      previews: np.ndarray | None = None,
  ) -> np.ndarray:
    """Returns the exact log-probability of grids under AR sampling.

    Args:
      tokens: int32 [B, R, C].
      prompts: One per grid.
      previews: int32 [B, R, C], if the model generates previews; the result is
        then the probability of the grids after these.

    Returns:
      float32 [B], in nats.
    """
    tokens = self._checked_grids(tokens, prompts)
    settings, guided = self.sampling()
    prompt, _ = self.family.encode_prompts(list(prompts), guided)
    check((previews is None) == (self.model.preview is None), "previews",
          None if previews is None else "tokens",
          "given if the model generates a preview first, and only then")
    if previews is not None:
      given = arguments.grids_of(
          previews, preview.model_of(self.model).grid, self.model.vocab,
          prompts)
      prompt = preview.extend(prompt, self.model, given)
    logits = self.programs.stream_logits(
        self.params, prompt, self.sequence(tokens))
    p_BNV = np.asarray(sampling_lib.target(logits, settings))
    taken = tokens.reshape(len(tokens), -1)
    p_BTV = p_BNV[:, self.model.grid.slot_of.ravel()]
    p_BT = np.take_along_axis(p_BTV, taken[..., None], -1)[..., 0]
    with np.errstate(divide="ignore"):
      return np.log(p_BT).sum(-1)

  def nll(
      self, tokens: np.ndarray, prompts: Sequence[str], batch: int = 4,
      **sampling: Unpack[Overrides],
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns each token's negative log-likelihood and the entropy there.

    See `likelihood.token_nll`; top-k and top-p are left out.

    Args:
      tokens: int32 [B, R, C].
      prompts: One per grid.
      batch: Grids evaluated together.
      **sampling: As for `generate`.

    Returns:
      Two arrays, float32 [B, R, C], in nats.
    """
    preview.check_one_grid(self.model.preview, "nll")
    tokens = self._checked_grids(tokens, prompts)
    settings, guided = self.sampling(**sampling)
    pairs = []
    for start in range(0, len(tokens), batch):
      part = np.arange(start, start + batch).clip(max=len(tokens) - 1)
      texts = [prompts[i] for i in part]
      prompt, _ = self.family.encode_prompts(texts, guided)
      pair = self.programs.token_nll(
          self.params, prompt, self.sequence(tokens[part]), settings)
      pairs.append([np.asarray(x)[:len(tokens) - start] for x in pair])
    nll, entropy = (np.concatenate(x) for x in zip(*pairs, strict=True))
    return nll, entropy

  def decode_images(self, tokens: np.ndarray, batch: int = 8) -> np.ndarray:
    """Returns the images of token grids.

    Args:
      tokens: int32 [B, R, C].
      batch: Grids decoded together.

    Returns:
      uint8 [B, H, W, 3].
    """
    images, tokens = [], self._checked_grids(tokens)
    for start in range(0, len(tokens), batch):
      part = np.arange(start, start + batch).clip(max=len(tokens) - 1)
      decoded = self.programs.decode_images(tokens[part], Clock())
      images.append(sharding.fetch(decoded)[:len(tokens) - start])
    return np.concatenate(images)

  def encode_images(self, images: np.ndarray) -> np.ndarray:
    """Returns the token grids of images, int32 [B, R, C].

    Args:
      images: uint8 [B, H, W, 3], of the model's size.

    Raises:
      UserError: if they have another size, or the model no tokenizer.
    """
    self._check_encoder()
    if np.shape(images)[1:] != self.image_shape:
      raise UserError(f"Expected images {self.image_shape}, got images of "
                      f"shape {np.shape(images)[1:]}. Resize them.")
    return np.asarray(self._encode(self.vq_params, jnp.asarray(images)))

  def _check_encoder(self) -> None:
    """Raises UserError unless the image tokenizer encodes images."""
    if self.vq_params is None or "encoder" not in self.vq_params:
      raise UserError("Expected a model whose tokenizer encodes images, got "
                      "a model without one. Convert it with its "
                      "image tokenizer.")

  @functools.cached_property
  def _encode(self) -> Callable[[Params, jax.Array], jax.Array]:
    @jax.jit
    def encode(vq_params, images):
      apply = functools.partial(self.family.vq.apply, {"params": vq_params})
      return apply(apply(to_float(images), method="encode"), method="quantize")

    return encode

  def _checked_grids(
      self, tokens: np.ndarray, prompts: Sequence[str] | None = None
  ) -> np.ndarray:
    """Returns int32 grids; see `arguments.grids_of`."""
    return arguments.grids_of(
        tokens, self.model.grid, self.model.vocab, prompts)

  def sequence(self, tokens: np.ndarray) -> jax.Array:
    """Returns grids [B, R, C] as int32 [B, N], forced tokens in place."""
    grid = self.model.grid
    forced = np.maximum(grid.forced_tokens(self.model.vocab), 0)
    sequence = np.broadcast_to(forced, (len(tokens), grid.length)).copy()
    sequence[:, grid.slot_of.ravel()] = np.asarray(tokens).reshape(
        len(tokens), -1)
    return jnp.asarray(sequence)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes a model folder that `ssd_jax.load` reads; see `saving.save`."""
    saving.save(self, folder)
