"""What a user holds: a loaded model that draws pictures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import operator
import os
import pathlib
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.outputs import Output
from ssd_jax.core.types import Model, Params, Prompt
from ssd_jax.decoding import engine, sampling as sampling_lib
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.sampling import Overrides, Sampling
from ssd_jax.decoding.trees.relaxed import neighbour_table
from ssd_jax.models.layouts import inference_layout
from ssd_jax.pipeline import arguments, likelihood, saving
from ssd_jax.pipeline.stream import Stream, StreamRequest
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Clock, Listener, Progress


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A family with its parameters.

  Attributes:
    family: Builds prompts and turns codes into pictures; has `generator`, `vq`
      and default `sampling`.
    params: {"trunk": ..., and where at hand "heads": ..., "drafter": ...}.
    vq_params: Of the tokenizer, None where pictures are not painted.
    model: The network's functions.
    folders: Where its parts came from: "model", "heads", "drafter".
  """

  family: Any
  params: Params
  vq_params: Params
  model: Model
  folders: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)

  def generate(
      self,
      prompts: Sequence[str],
      decoder: engine.Decoder | str = AR(),
      *,
      num_images: int = 1,
      seed: int = 0,
      batch: int = 8,
      trace: bool = False,
      on_batch: Callable[[int], None] | None = None,
      on_pass: Callable[[Progress], None] | None = None,
      first_image: int | Sequence[int] = 0,
      **sampling: Unpack[Overrides],
  ) -> Output:
    """Draws `num_images` pictures for each prompt.

    Args:
      prompts: Any number of texts.
      decoder: Such as `ssd_jax.SSD(rounds=1)` or "ssd:rounds=1", or one of
        your own; see `engine.Decoder`.
      num_images: Per prompt.
      seed: Same seed, same pictures, however the call is cut into batches.
      batch: Pictures drawn together.
      trace: Also return the tokens after every pass.
      on_batch: Called with the number of pictures finished.
      on_pass: Called after every pass with a `Progress`, in passing: the loop
        does not wait for it. Calls that have one take turns.
      first_image: Index of the first picture, for a call that is one part of a
        larger one; or the index of each.
      **sampling: guidance, temperature, top_k or top_p instead of the family's.

    Raises:
      UserError: when a number is out of range or there is no prompt.
    """
    arguments.check_call(prompts, num_images, seed, batch, on_batch=on_batch,
                     on_pass=on_pass)
    texts = arguments.texts_of(prompts, num_images)
    settings, guided = self.sampling(**sampling)
    batch = sharding.even_batch(min(batch, len(texts)), 1 + guided)
    decoder = arguments.decoder_of(decoder)
    index_I = arguments.indices_of(first_image, len(texts), batch)
    chunks, notes, clock, mesh = [], [], Clock(), None
    for start in range(0, len(texts), batch):
      part = texts[start:start + batch]
      padded = part + [part[-1]] * (batch - len(part))
      prompt, said = self.family.encode_prompts(padded, guided)
      if start == 0 and not on_pass:  # each device would call it
        mesh = clock.compile(self.cores, decoder, prompt, settings, batch)
      listener = self._listener if on_pass else None
      with sharding.use_mesh(mesh):
        args = (self.params_for(decoder, mesh), sharding.shard_rows(prompt),
                settings, jax.random.key(seed), index_I[start:start + batch])
        run = clock.compile(self.compiled, engine.decode, decoder, *args,
                            trace=trace, on_pass=listener)
        with self._listener.tell(on_pass, len(part)):
          decoded = sharding.fetch(jax.block_until_ready(run(*args)))
      tokens = jnp.asarray(sharding.shard_rows(decoded.tokens))
      decode_images = clock.compile(self.compiled_images, tokens)
      images = decode_images(self.vq_params, tokens)
      chunk = (sharding.fetch(images), decoded.tokens, decoded.passes,
               decoded.commit_pass, decoded.history)
      drawn = operator.itemgetter(slice(len(part)))
      chunks.append(jax.tree.map(drawn, chunk))
      notes += [note for note in said if note not in notes]
      if on_batch:
        on_batch(len(part))
    images, tokens, passes, commit_pass, history = jax.tree.map(
        lambda *x: np.concatenate(x), *chunks)
    return Output(
        images, tokens, passes, commit_pass, tuple(texts), history,
        tuple(notes), clock.compiling, clock.rest(),
    )

  def stream(
      self,
      prompts: Iterable[str],
      decoder: engine.Decoder | str = AR(),
      *,
      num_images: int = 1,
      seed: int = 0,
      batch: int = 8,
      on_step: Callable[[float], None] | None = None,
      first_image: int | Sequence[int] = 0,
      **sampling: Unpack[Overrides],
  ) -> Stream:
    """The pictures that `generate` draws, one by one as they finish.

    A picture that is done leaves the batch and the next prompt takes its
    place, so that none waits for another; prompts are read as there is room.

    Args:
      prompts: Any number of texts, also without end.
      decoder: As for `generate`, like all that follow.
      num_images: Per prompt.
      seed: Same seed, same pictures.
      batch: Pictures drawn together.
      on_step: Called every few passes with how much has become final since, in
        pictures; all that it is told sums up to their number.
      first_image: Index of the first picture; or the index of each.
      **sampling: guidance, temperature, top_k or top_p instead of the family's.

    Raises:
      UserError: when a number is out of range or there is no prompt.
    """
    arguments.check_call(prompts, num_images, seed, batch, on_step=on_step)
    settings, guided = self.sampling(**sampling)
    decoder = arguments.decoder_of(decoder)
    if isinstance(prompts, Sequence):
      count = len(prompts) * num_images
      first_image = arguments.indices_of(first_image, count, 1).tolist()
      batch = min(batch, count)
    batch = sharding.even_batch(batch, 1 + guided)
    return Stream(self, StreamRequest(
        map(arguments.text_of, prompts), decoder, num_images, seed, batch,
        first_image, settings, guided, on_step))

  def cores(
      self, decoder: engine.Decoder, prompt: Prompt, settings: Sampling,
      batch: int,
  ) -> jax.sharding.Mesh | None:
    """The devices of a CPU that should share a batch: `sharding.cpu_mesh`."""
    rows = len(prompt.tokens)
    if sharding.cpu_mesh(rows, self.model.grid.length) is None:
      return None  # none ever would
    key = (decoder, rows, batch)
    if key not in self._queries:
      self._queries[key] = engine.count_queries(
          self.model, decoder, self.params_for(decoder), prompt, settings,
          batch)
    return sharding.cpu_mesh(rows, self._queries[key])

  def params_for(
      self, decoder: engine.Decoder, mesh: jax.sharding.Mesh | None = None
  ) -> Params:
    """Parameters in the form that this device draws with.

    For who reads one, with the table of neighbouring codes. It is made of the
    tokenizer's codebook, without one of the trunk's input table, when a decoder
    that has `neighbours` first asks.

    Args:
      decoder: Settings.
      mesh: Of the cores that share a batch; None unless `cores` gave one.
    """
    params = self._drawing
    count = min(getattr(decoder, "neighbours", 0), self.model.vocab - 1)
    if count >= 1 and "neighbours" not in params:
      if count not in self._neighbours:
        table_VK = neighbour_table(self._codes_VE(), count)
        self._neighbours[count] = jnp.asarray(table_VK)
      params = {**params, "neighbours": self._neighbours[count]}
    if mesh is None:
      return params
    if (mesh, count) not in self._lent:
      self._lent[mesh, count] = sharding.replicate(params, mesh)
    return self._lent[mesh, count]

  @property
  def _drawing(self) -> Params:
    """In the form for devices that share the weights, or for those that do not.
    """
    is_cut = sharding.num_param_shards() > 1
    if is_cut not in self._forms:
      self._forms[is_cut] = inference_layout(self.params)
    return self._forms[is_cut]

  @functools.cached_property
  def _forms(self) -> dict[bool, Params]:
    return {}

  @functools.cached_property
  def _neighbours(self) -> dict[int, jax.Array]:
    return {}

  @functools.cached_property
  def _lent(self) -> dict[tuple[jax.sharding.Mesh, int], Params]:
    return {}

  @functools.cached_property
  def _queries(self) -> dict[tuple[Any, int, int], int]:
    return {}

  def _codes_VE(self) -> np.ndarray:
    """Image codes as vectors whose distances mean something."""
    if self.vq_params is not None:
      return np.asarray(
          self.family.vq.apply({"params": self.vq_params}, method="codes"))
    codes_V = jnp.arange(self.model.vocab)
    return np.asarray(self.model.embed(self.params, codes_V), np.float32)

  def sampling(self, **overrides: Unpack[Overrides]) -> tuple[Sampling, bool]:
    """(settings of the target distribution, whether two streams are run)."""
    values = dict(self.family.sampling)
    unknown = set(overrides) - set(values)
    if unknown:
      raise UserError(f"got setting {min(unknown)!r}, expected one of "
                      f"{sorted(values)}; correct it")
    values |= {k: v for k, v in overrides.items() if v is not None}
    arguments.check_sampling(values)
    return Sampling.make(**values), values["guidance"] != 1.0

  def log_prob(self, tokens: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """float32 [B]: exact joint log-probability of grids under AR sampling.

    Args:
      tokens: int32 [B, R, C].
      prompts: One per grid.
    """
    tokens = self._grids(tokens, prompts)
    p_BNV, slots = self._targets(tokens, prompts)
    taken = tokens.reshape(len(tokens), -1)
    p_BN = np.take_along_axis(p_BNV[:, slots], taken[..., None], -1)[..., 0]
    with np.errstate(divide="ignore"):
      return np.log(p_BN).sum(-1)

  def nll(
      self, tokens: np.ndarray, prompts: Sequence[str], batch: int = 4,
      **sampling: Unpack[Overrides],
  ) -> tuple[np.ndarray, np.ndarray]:
    """(surprisal of each code, entropy there), float32 [B, R, C], in nats.

    See `likelihood.surprisal`; top-k and top-p play no part in it.

    Args:
      tokens: int32 [B, R, C].
      prompts: One per grid.
      batch: Grids looked at together.
      **sampling: As for `generate`.
    """
    tokens = self._grids(tokens, prompts)
    settings, guided = self.sampling(**sampling)
    pairs = []
    for start in range(0, len(tokens), batch):
      part = np.arange(start, start + batch).clip(max=len(tokens) - 1)
      texts = [prompts[i] for i in part]
      prompt, _ = self.family.encode_prompts(texts, guided)
      sequence = self.sequence(tokens[part])
      pair = self._surprisal(self.params, prompt, sequence, settings)
      pairs.append([np.asarray(x)[:len(tokens) - start] for x in pair])
    nll, entropy = (np.concatenate(x) for x in zip(*pairs, strict=True))
    return nll, entropy

  @functools.cached_property
  def _surprisal(self):
    return likelihood.surprisal(self.family.generator)

  def decode_images(self, tokens: np.ndarray, batch: int = 8) -> np.ndarray:
    """uint8 [B, H, W, 3]: the pictures of grids, int32 [B, R, C]."""
    images, tokens = [], self._grids(tokens)
    for start in range(0, len(tokens), batch):
      part = np.arange(start, start + batch).clip(max=len(tokens) - 1)
      ids = jnp.asarray(tokens[part])
      decoded = self.compiled_images(ids)(self.vq_params, ids)
      images.append(np.asarray(decoded)[:len(tokens) - start])
    return np.concatenate(images)

  def _grids(
      self, tokens: np.ndarray, prompts: Sequence[str] | None = None
  ) -> np.ndarray:
    """Checked: see `calls.grids_of`."""
    return arguments.grids_of(
        tokens, self.model.grid, self.model.vocab, prompts)

  def program_bytes(self, decoder: engine.Decoder) -> int | None:
    """Peak memory of the largest program compiled for a decoder.

    Its arguments (the weights among them), results and scratch memory as the
    compiler planned them; None where it does not tell or nothing was drawn yet.
    """
    sizes = []
    for key, program in self._executables.items():
      plan = program.memory_analysis() if key[0] == decoder else None
      if plan is not None:
        sizes.append(
            plan.argument_size_in_bytes + plan.output_size_in_bytes
            + plan.temp_size_in_bytes - plan.alias_size_in_bytes)
    return max(sizes, default=None)

  def _targets(self, tokens, prompts) -> tuple[np.ndarray, np.ndarray]:
    """(target distribution [B, N, V] of every slot, slots of the cells)."""
    settings, guided = self.sampling()
    prompt, _ = self.family.encode_prompts(list(prompts), guided)
    sequence = self.sequence(tokens)
    logits = self._stream_logits(self.params, prompt, sequence)
    return (np.asarray(sampling_lib.target(logits, settings)),
            self.model.grid.slot_of.ravel())

  def sequence(self, tokens: np.ndarray) -> jax.Array:
    """int32 [B, N]: grids with their forced tokens in place."""
    grid = self.model.grid
    forced = np.maximum(grid.forced_tokens(self.model.vocab), 0)
    sequence = np.broadcast_to(forced, (len(tokens), grid.length)).copy()
    sequence[:, grid.slot_of.ravel()] = np.asarray(tokens).reshape(
        len(tokens), -1)
    return jnp.asarray(sequence)

  @functools.cached_property
  def _stream_logits(self):
    """Jitted: (params, prompt, sequence [B, N]) -> logits [G, B, N, V]."""
    generator = self.family.generator

    @jax.jit
    def logits(params, prompt: Prompt, sequence):
      streams = prompt.tokens.shape[0] // sequence.shape[0]
      hidden = generator.hidden(
          params, prompt, jnp.concatenate([sequence] * streams))
      logits = generator.logits(params, hidden)
      return logits.reshape(streams, -1, *logits.shape[1:])

    return logits

  @functools.cached_property
  def _executables(self) -> dict:
    return {}

  @functools.cached_property
  def _listener(self) -> Listener:
    return Listener()

  def save(self, folder: str | os.PathLike) -> None:
    """Writes a model folder that `ssd_jax.load` reads: see `saving.save`."""
    saving.save(self, folder)

  def compiled(self, function: Any, decoder: engine.Decoder, *args, **static):
    """`function(model, decoder, *args, **static)`, compiled for such args.

    It is then called with `args` alone, which start with the parameters.
    """
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), args[1:])
    leaves, structure = jax.tree.flatten(shapes)
    key = (decoder, function.__name__, tuple(static.items()),
           tuple(map(str, leaves)), structure, sharding.current())
    if key not in self._executables:
      self._executables[key] = function.lower(
          self.model, decoder, *args, **static).compile()
    return self._executables[key]

  def compiled_images(self, tokens: jax.Array):
    """The compiled function of (vq_params, tokens) that paints such grids."""
    key = ("images", tokens.shape, sharding.current())
    if key not in self._executables:
      decode = jax.jit(self.family.decode)
      self._executables[key] = decode.lower(self.vq_params, tokens).compile()
    return self._executables[key]
