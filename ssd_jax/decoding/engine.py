"""The one jitted loop behind every decoder: propose -> forward -> resolve.

A decoder is written for ONE image; the engine runs a batch of them at their own
speeds. Per pass it

  1. asks each image's decoder which slots and drafts to feed (`propose`);
  2. runs the trunk once over all queries of all images and guidance streams;
  3. turns logits into the target distribution;
  4. lets each image's decoder accept, resample, commit and redraft (`resolve`);
  5. moves keys and values of accepted drafts from scratch slots to their final
     slots, as the decoder's `settle` requests.

A finished image feeds inactive queries and keeps its state, so its tokens do
not depend on the other images of the batch.
"""

from collections.abc import Callable
import functools
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError
from ssd_jax.core.protocols import Decoder, DecoderState
from ssd_jax.core.types import KVCache, Model, Params, Prompt, Queries
from ssd_jax.decoding import sampling as sampling_lib
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.runtime import sharding

_State = TypeVar("_State")


class Context(flax.struct.PyTreeNode):
  """Inputs of a decoder for one image and one pass.

  Attributes:
    key: Random key of the image, the same in all passes.
    image: int32 [], index of the image over the whole call.
    root: Random key of the image and the pass, see `pass_root`.
    params: Parameters of the model, e.g. for drafting with heads.
    sampling: Settings of the target distribution.
    model: The network's functions; static.
    draft: int32 [N], the prompt's first draft of every slot, -1 where there is
      none; None if the prompt has no drafts.
  """

  key: jax.Array
  image: jax.Array
  root: jax.Array
  params: Params
  sampling: Sampling
  model: Model = flax.struct.field(pytree_node=False)
  draft: jax.Array | None = None

  def token_noise(self, slots_Q: jax.Array) -> jax.Array:
    """Returns the slots' Gumbel noise, float32 [Q, V], equal in every pass."""
    return sampling_lib.token_noise(
        self.key, self.image, slots_Q, self.model.vocab
    )

  def pass_key(self, purpose: int) -> jax.Array:
    """Returns a key that is unique to this image, pass and purpose."""
    return jax.random.fold_in(self.root, purpose)

  def target(self, logits_GV: jax.Array) -> jax.Array:
    """Returns the target distribution, float32 [..., V].

    Args:
      logits_GV: [G, ..., V], logits of the stacked guidance streams.
    """
    return sampling_lib.target(logits_GV, self.sampling)


def pass_root(
    key: jax.Array, image: jax.Array, index: jax.Array
) -> jax.Array:
  """Returns the key that the keys of a pass are derived from.

  It is made once per pass: each derivation is a loop of its own on a CPU.

  Args:
    key: Random key of the image.
    image: int32 [], index of the image over the whole call.
    index: int32 [], number of the pass; the prefill is 1.
  """
  # Token noise folds (image, slot); this branch starts from another key.
  key = jax.random.fold_in(key, jnp.uint32(2**32 - 1))
  return jax.random.fold_in(jax.random.fold_in(key, image), index)


def given_drafts(ctx: Context, setting: str) -> jax.Array:
  """Returns the prompt's first draft of every slot, int32 [N]; -1 for none.

  Args:
    ctx: Context of the pass.
    setting: The decoder's setting that asks for them.

  Raises:
    UserError: The model has no preview.
  """
  if ctx.draft is None:
    raise UserError(
        f"Expected a model that generates a preview first for {setting}="
        "preview, got a model of one grid. Choose other drafts.")
  return ctx.draft


# A context without an image, or one that holds vmap axes instead of arrays.
template_context: Callable[..., Context] = Context


def image_axes(model: Model) -> Context:
  """Returns the axes over which contexts of a batch are mapped."""
  return template_context(0, 0, 0, None, 0, model, 0)


@flax.struct.dataclass
class Decoded:
  """The result of decoding.

  Attributes:
    tokens: int32 [B, R, C], image tokens.
    passes: int32 [B], forward passes until the image was final.
    commit_pass: int32 [B, R, C], pass in which each token became final; 1 is
      the prefill.
    history: int32 [B, N + 1, R, C], tokens and drafts after each pass, or
      None. Entry i holds pass i + 1; passes beyond N + 1 overwrite the last.
  """

  tokens: jax.Array
  passes: jax.Array
  commit_pass: jax.Array
  history: jax.Array | None


class LoopState(flax.struct.PyTreeNode):
  """A batch of images in progress; the carry of the loop.

  Attributes:
    image: int32 [B], index of each image over the whole call.
    key: Random key of each image, [B].
    sampling: Settings of the target distribution of each image, [B].
    prompt: Prompts; rows are [cond of all B, then uncond of all B], or cond
      alone.
    cache: Keys and values, with the prompt's rows.
    decoder: The decoders' states; the batch axis comes first in each leaf.
    passes: int32 [B], forward passes run for each image.
    commit_pass: int32 [B, N], pass in which each slot became final, else 0.
    history: int32 [B, N + 1, N], tokens and drafts after each pass, or None.
  """

  image: jax.Array
  key: jax.Array
  sampling: Sampling
  prompt: Prompt
  cache: KVCache
  decoder: DecoderState
  passes: jax.Array
  commit_pass: jax.Array
  history: jax.Array | None

  @property
  def is_done(self) -> jax.Array:
    """Which images are final, bool [B]."""
    return jnp.all(self.decoder.final, axis=-1)


@functools.partial(
    jax.jit, static_argnames=("model", "decoder", "trace", "on_pass"))
def decode(
    model: Model, decoder: Decoder, params: Params, prompt: Prompt,
    sampling: Sampling, key: jax.Array, image_B: jax.Array,
    trace: bool = False, on_pass: Callable[..., None] | None = None,
) -> Decoded:
  """Generates one image per entry of `image_B`.

  Args:
    model: The network's functions; static.
    decoder: Decoder settings; static.
    params: Parameters of the network.
    prompt: Prompts; rows are [cond of all B, then uncond of all B], or cond
      alone.
    sampling: Settings of the target distribution.
    key: Random key of the call.
    image_B: int32 [B], index of each image over the whole call; keys its noise.
    trace: Whether to record the tokens after every pass.
    on_pass: Called on the host after every pass, with the number of passes,
      image_B, the tokens [B, R, C] and which are final [B, R, C]; static. The
      loop does not wait for the call, but copies these arrays to the host.
  """
  template = template_context(key, None, None, params, sampling, model)
  slots_RC = jnp.asarray(model.grid.slot_of)

  def report(loop: LoopState) -> LoopState:
    if on_pass is not None:
      state = loop.decoder
      jax.debug.callback(on_pass, jnp.max(loop.passes), image_B,
                         state.tokens[:, slots_RC], state.final[:, slots_RC])
    return loop

  loop = jax.lax.while_loop(
      lambda loop: ~jnp.all(loop.is_done),
      lambda loop: report(step(decoder, template, loop)),
      report(begin(decoder, template, prompt, image_B, trace)),
  )
  return decoded(model, loop)


def count_queries(
    model: Model, decoder: Decoder, params: Params, prompt: Prompt,
    sampling: Sampling, batch: int,
) -> int:
  """Returns the number of queries of a pass for one image, with inactive ones.

  The functions are traced only; nothing is computed.
  """

  def first_queries(params, prompt, sampling, key, image):
    one = jax.tree.map(lambda x: x[::batch], prompt)
    loop = begin_image(model, decoder, params, one, sampling, key, image)
    template = template_context(None, None, None, params, None, model)
    return _over_images(model, decoder.propose)(
        _next_context(template, loop), loop.decoder)

  queries = jax.eval_shape(
      first_queries, params, prompt, sampling, jax.random.key(0), jnp.int32(0))
  return queries.tokens.shape[-1]


@functools.partial(jax.jit, static_argnames=("model", "decoder"), inline=True)
def begin_image(
    model: Model, decoder: Decoder, params: Params, prompt: Prompt,
    sampling: Sampling, key: jax.Array, image: jax.Array,
) -> LoopState:
  """Runs the first pass of one image; see `begin`.

  Programs for batches of any size share it, and JAX traces it once for all.

  Args:
    model: The network's functions; static.
    decoder: Decoder settings; static.
    params: Parameters of the network.
    prompt: The prompt of the image.
    sampling: Settings of the target distribution.
    key: Random key of the image.
    image: int32 [], index of the image over the whole call.
  """
  template = template_context(key, None, None, params, sampling, model)
  return begin(decoder, template, prompt, image[None])


def begin(
    decoder: Decoder, template: Context, prompt: Prompt, image_B: jax.Array,
    trace: bool = False,
) -> LoopState:
  """Runs the first pass of each image, the prefill.

  Args:
    decoder: Decoder settings.
    template: A context without an image; its key and settings are those of
      all images.
    prompt: The prompt of each image.
    image_B: int32 [B], index of each image over the whole call.
    trace: Whether to record the tokens after every pass.
  """
  model, params = template.model, template.params
  batch, length = len(image_B), model.grid.length
  key_B = jnp.broadcast_to(template.key, (batch,))
  sampling_B = template.sampling.repeat(batch)
  root_B = jax.vmap(pass_root)(key_B, image_B, jnp.ones_like(image_B))
  ctx = template.replace(
      key=key_B, image=image_B, root=root_B, sampling=sampling_B,
      draft=_first_drafts(model, prompt, batch))
  hidden, cache = model.prefill(params, prompt, decoder.scratch(model))
  hidden, cache = _split_streams(hidden, batch), sharding.constrain_cache(cache)
  p_BV = ctx.target(model.logits(params, hidden))
  state = _over_images(model, decoder.start)(
      ctx, p_BV, jnp.moveaxis(hidden, 1, 0))
  history = jnp.zeros((batch, length + 1, length), jnp.int32)
  loop = LoopState(
      image_B, key_B, sampling_B, prompt, cache, state,
      jnp.zeros(batch, jnp.int32), jnp.zeros((batch, length), jnp.int32),
      history if trace else None)
  return _record(loop, state, cache, jnp.zeros(batch, bool))


def step(decoder: Decoder, template: Context, loop: LoopState) -> LoopState:
  """Runs one more pass; finished images stay unchanged."""
  model, params, done_B = template.model, template.params, loop.is_done
  batch = len(done_B)
  over = functools.partial(_over_images, model)
  ctx = _next_context(template, loop)
  queries = over(decoder.propose)(ctx, loop.decoder)
  queries = sharding.constrain_rows(_deactivate_done(queries, done_B))
  streams = loop.prompt.tokens.shape[0] // batch
  stacked = jax.tree.map(
    functools.partial(_repeat_over_streams, streams), queries
  )
  stacked = sharding.constrain_rows(stacked)
  hidden, cache = model.forward(params, loop.cache, loop.prompt, stacked)
  hidden = _split_streams(hidden, batch)
  p_BQV = sharding.constrain_rows(ctx.target(model.logits(params, hidden)))
  after = over(decoder.resolve)(
      ctx, loop.decoder, queries, p_BQV, jnp.moveaxis(hidden, 1, 0))
  cache = _settle(decoder, ctx, after, cache, done_B)
  cache = sharding.constrain_cache(cache)
  after = _keep_done(done_B, loop.decoder, after)
  return _record(loop, after, cache, done_B)


def _next_context(template: Context, loop: LoopState) -> Context:
  """Returns the contexts of the images' next pass; see `image_axes`."""
  root_B = jax.vmap(pass_root)(loop.key, loop.image, loop.passes + 1)
  return template.replace(
      key=loop.key, image=loop.image, root=root_B, sampling=loop.sampling,
      draft=_first_drafts(template.model, loop.prompt, len(loop.image)))


def decoded(model: Model, loop: LoopState) -> Decoded:
  """Returns the tokens decoded so far, in grid order."""
  slots_RC = jnp.asarray(model.grid.slot_of)
  history = None if loop.history is None else loop.history[..., slots_RC]
  return Decoded(loop.decoder.tokens[:, slots_RC], loop.passes,
                 loop.commit_pass[:, slots_RC], history)


def _first_drafts(
    model: Model, prompt: Prompt, batch: int
) -> jax.Array | None:
  """Returns the prompts' first drafts, int32 [B, N], or None."""
  if prompt.draft is None:
    return None
  return prompt.draft[:batch, prompt.draft.shape[1] - model.grid.length:]


def _split_streams(x_SD: jax.Array, batch: int) -> jax.Array:
  """Reshapes rows [S, ...] to [G, B, ...]."""
  return x_SD.reshape(-1, batch, *x_SD.shape[1:])


def _repeat_over_streams(streams: int, x_B: jax.Array) -> jax.Array:
  """Repeats [B, ...] for each guidance stream, giving rows [S, ...].

  A concatenation would make devices that share rows exchange data.
  """
  x_GB = jnp.broadcast_to(x_B, (streams, *x_B.shape))
  return x_GB.reshape(-1, *x_B.shape[1:])


def _over_images(model: Model, function):
  """Maps a function of one image's context and arrays over the batch."""
  axes = image_axes(model)

  def call(ctx, *args):
    return jax.vmap(function, in_axes=(axes, *(0 for _ in args)))(ctx, *args)

  return call


def _deactivate_done(queries: Queries, done_B: jax.Array) -> Queries:
  """Makes the queries of finished images inactive: they write nowhere."""
  nowhere = queries.visible.shape[-1]
  slots = jnp.where(done_B[:, None], nowhere, queries.slots)
  return queries.replace(slots=slots)


def _settle(
    decoder: Decoder, ctx: Context, state: DecoderState, cache: KVCache,
    done_B: jax.Array,
) -> KVCache:
  """Moves keys and values from scratch slots to their final slots."""
  moves = _over_images(ctx.model, decoder.settle)(ctx, state)
  if moves is None or cache is None:  # a model without keys and values
    return cache
  source_BM, target_BM = moves
  slots = ctx.model.grid.length + decoder.scratch(ctx.model)
  target_BM = jnp.where(done_B[:, None], slots, target_BM)
  streams, prompt = cache.shape[1], cache.shape[3] - slots
  repeat = lambda x: jnp.tile(x, (streams // len(done_B), 1)) + prompt
  source_SM, target_SM = repeat(source_BM), repeat(target_BM)
  rows = jnp.arange(streams)[:, None]
  move = lambda x: x.at[:, rows, :, target_SM].set(
      x[:, rows, :, source_SM], mode="drop")
  return jax.tree.map(move, cache)


def _keep_done(done_B: jax.Array, before: _State, after: _State) -> _State:
  """Keeps the state before the pass for finished images."""
  keep = lambda a, b: jnp.where(
      done_B.reshape(-1, *(1 for _ in a.shape[1:])), a, b
  )
  return jax.tree.map(keep, before, after)


def _record(
    loop: LoopState, state: DecoderState, cache: KVCache, done_B: jax.Array
) -> LoopState:
  """Returns the loop's carry after a pass."""
  passes = jnp.where(done_B, loop.passes, loop.passes + 1)
  is_new = state.final & (loop.commit_pass == 0)
  history = loop.history
  if history is not None:
    at = jnp.minimum(jnp.max(passes), history.shape[1]) - 1
    history = history.at[:, at].set(state.tokens)
  return loop.replace(
      cache=cache, decoder=state, passes=passes, history=history,
      commit_pass=jnp.where(is_new, passes[:, None], loop.commit_pass))
