"""The one jitted loop behind every decoder: propose -> forward -> resolve.

A decoder is written for ONE image; the engine runs a batch of them at their own
speeds. Per pass it

  1. asks each image's decoder where to look, with which drafts (`propose`);
  2. runs the trunk once over all queries of all images and guidance streams;
  3. turns logits into the target distribution;
  4. lets each image's decoder accept, resample, commit and redraft (`resolve`);
  5. moves keys and values that were written to scratch slots and turned out
     final to their own slots, where the decoder has a `settle`.

An image that is done feeds inactive queries and keeps its state, so what it is
does not depend on its neighbours.
"""

from collections.abc import Callable
import functools
from typing import Any, ClassVar, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.grid import Grid
from ssd_jax.core.types import KVCache, Model, Params, Prompt, Queries
from ssd_jax.decoding import sampling as sampling_lib
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.runtime import sharding


class Context(flax.struct.PyTreeNode):
  """What a decoder knows of its image in a pass.

  Attributes:
    key: Of the call; the same for all images and passes.
    image: int32 [], index of the image over the whole call.
    index: int32 [], the number of the pass; the prefill is 1.
    params: Of the model, for drafting with heads.
    sampling: Of the target distribution.
    model: Static.
  """

  key: jax.Array
  image: jax.Array
  index: jax.Array
  params: Params
  sampling: Sampling
  model: Model = flax.struct.field(pytree_node=False)

  def token_noise(self, slots_Q: jax.Array) -> jax.Array:
    """float32 [Q, V]: Gumbel noise of slots, the same in every pass."""
    return sampling_lib.token_noise(
        self.key, self.image, slots_Q, self.model.vocab
    )

  def pass_key(self, purpose: int) -> jax.Array:
    """A key that no other image, pass or purpose has."""
    # Token noise folds (image, slot); this branch starts from another key.
    key = jax.random.fold_in(self.key, jnp.uint32(2**32 - 1))
    key = jax.random.fold_in(key, self.image)
    return jax.random.fold_in(jax.random.fold_in(key, self.index), purpose)

  def target(self, logits_GV: jax.Array) -> jax.Array:
    """float32 [..., V]: the distribution of stacked streams' logits."""
    return sampling_lib.target(logits_GV, self.sampling)


# A context of no image yet, or of the axes that are mapped over.
outline: Callable[..., Context] = Context


class Decoder(Protocol):
  """A frozen dataclass of static settings with three pure functions.

  Its state is a `flax.struct` dataclass of ONE image's arrays with at least
  `tokens` (int32 [N], drafts included) and `final` (bool [N]).

  Attributes:
    name: On the command line.
    lossless: Whether the joint law of the output equals AR's on every grid.
  """

  name: str
  __dataclass_fields__: ClassVar[dict[str, Any]]

  @property
  def lossless(self) -> bool:
    """Whether the joint law of the output equals AR's on every grid."""

  def scratch(self, model: Model) -> int:
    """Cache slots beyond the sequence."""

  def start(self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array) -> Any:
    """State after the prefill, which predicts slot 0."""

  def propose(self, ctx: Context, state: Any) -> Queries:
    """Where to look this pass, with which drafts."""

  def resolve(
      self, ctx: Context, state: Any, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> Any:
    """State after a pass: row i of p is the target at queries[i] + 1."""

  # A decoder that feeds the same slot several times in a pass (a tree) writes
  # keys and values to scratch slots and has one function more:
  #
  #   settle(ctx, state) -> (source_M, target_M)
  #
  # int32 slots of one image: after `resolve`, what pass t wrote to source[i] is
  # copied to target[i]; target X is nowhere. M rows are touched, not the cache.
  #
  # One that is lossless on some grids alone says so by `lossless_on(grid)`; see
  # `is_lossless`.


def is_lossless(decoder: Decoder, grid: Grid) -> bool:
  """Whether the joint law of what a decoder draws on this grid is AR's."""
  if hasattr(decoder, "lossless_on"):
    return bool(decoder.lossless_on(grid))
  return bool(decoder.lossless)


@flax.struct.dataclass
class Decoded:
  """What decoding returns.

  Attributes:
    tokens: int32 [B, R, C], image codes.
    passes: int32 [B], trunk forwards until the image was final.
    commit_pass: int32 [B, R, C], pass at which each cell became final; 1 is
      the prefill.
    history: int32 [B, passes, R, C], tokens and drafts after each pass, or
      None. Of N slots the first N passes, and the last.
  """

  tokens: jax.Array
  passes: jax.Array
  commit_pass: jax.Array
  history: jax.Array | None


class LoopState(flax.struct.PyTreeNode):
  """Images being drawn together; the carry of the loop.

  Attributes:
    image: int32 [B], index of each over the whole call.
    prompt: Rows are [cond of all B, then uncond of all B], or cond alone.
    cache: Keys and values, rows as the prompt's.
    decoder: The decoders' states; leaves lead with the batch axis.
    passes: int32 [B], trunk forwards run for each.
    commit_pass: int32 [B, N], 0 while not final.
    history: int32 [B, N + 1, N] or None.
  """

  image: jax.Array
  prompt: Prompt
  cache: KVCache
  decoder: Any
  passes: jax.Array
  commit_pass: jax.Array
  history: jax.Array | None

  @property
  def is_done(self) -> jax.Array:
    """bool [B], which images are final."""
    return jnp.all(self.decoder.final, axis=-1)


@functools.partial(
    jax.jit, static_argnames=("model", "decoder", "trace", "on_pass"))
def decode(
    model: Model, decoder: Decoder, params: Params, prompt: Prompt,
    sampling: Sampling, key: jax.Array, image_B: jax.Array,
    trace: bool = False, on_pass: Callable[..., None] | None = None,
) -> Decoded:
  """Draws one image per entry of `image_B`.

  Args:
    model: The network's functions; static.
    decoder: Settings; static.
    params: Of the network.
    prompt: Rows are [cond of all B, then uncond of all B], or cond alone.
    sampling: Of the target distribution.
    key: Of the call.
    image_B: int32 [B], index over the whole call; keys an image's noise.
    trace: Also record the tokens after every pass.
    on_pass: Called on the host after every pass, with the number of passes,
      image_B, the tokens and which are final [B, R, C]; static. The loop runs
      on without waiting for it, but copies these arrays to the host.
  """
  call = outline(key, None, None, params, sampling, model)
  cells = jnp.asarray(model.grid.slot_of)

  def tell(loop: LoopState) -> LoopState:
    if on_pass is not None:
      state = loop.decoder
      jax.debug.callback(on_pass, jnp.max(loop.passes), image_B,
                         state.tokens[:, cells], state.final[:, cells])
    return loop

  loop = jax.lax.while_loop(
      lambda loop: ~jnp.all(loop.is_done),
      lambda loop: tell(step(decoder, call, loop)),
      tell(begin(decoder, call, prompt, image_B, trace)),
  )
  return decoded(model, loop)


def count_queries(
    model: Model, decoder: Decoder, params: Params, prompt: Prompt,
    sampling: Sampling, batch: int,
) -> int:
  """Slots that a pass feeds for one image, idle ones included.

  Traced: nothing is computed.
  """

  def look(params, prompt, image_B):
    call = outline(jax.random.key(0), None, None, params, sampling, model)
    loop = begin(decoder, call, prompt, image_B)
    ctx = call.replace(image=image_B, index=loop.passes)
    return _over_images(model, decoder.propose)(ctx, loop.decoder)

  queries = jax.eval_shape(look, params, prompt, jnp.arange(batch))
  return queries.tokens.shape[-1]


def begin(
    decoder: Decoder, call: Context, prompt: Prompt, image_B: jax.Array,
    trace: bool = False,
) -> LoopState:
  """Images after their first pass, the prefill.

  Args:
    decoder: Settings.
    call: A context that is of no image yet.
    prompt: Of each image.
    image_B: int32 [B], index over the whole call.
    trace: Whether the tokens after every pass are recorded.
  """
  batch, length = len(image_B), call.model.grid.length
  ctx = call.replace(image=image_B, index=jnp.ones_like(image_B))
  hidden, cache = call.model.prefill(
      call.params, prompt, decoder.scratch(call.model))
  hidden, cache = _unstack(hidden, batch), sharding.constrain_cache(cache)
  p_BV = ctx.target(call.model.logits(call.params, hidden))
  state = _over_images(call.model, decoder.start)(
      ctx, p_BV, jnp.moveaxis(hidden, 1, 0))
  history = jnp.zeros((batch, length + 1, length), jnp.int32)
  loop = LoopState(
      image_B, prompt, cache, state, jnp.zeros(batch, jnp.int32),
      jnp.zeros((batch, length), jnp.int32), history if trace else None)
  return _record(loop, state, cache, jnp.zeros(batch, bool))


def step(decoder: Decoder, call: Context, loop: LoopState) -> LoopState:
  """Images after one more pass; those that are done stay as they are."""
  model, params, done_B = call.model, call.params, loop.is_done
  batch = len(done_B)
  over = functools.partial(_over_images, model)
  ctx = call.replace(image=loop.image, index=loop.passes + 1)
  queries = over(decoder.propose)(ctx, loop.decoder)
  queries = sharding.constrain_rows(_silence(queries, done_B))
  streams = loop.prompt.tokens.shape[0] // batch
  stacked = jax.tree.map(functools.partial(_for_each, streams), queries)
  stacked = sharding.constrain_rows(stacked)
  hidden, cache = model.forward(params, loop.cache, loop.prompt, stacked)
  hidden = _unstack(hidden, batch)
  p_BQV = sharding.constrain_rows(ctx.target(model.logits(params, hidden)))
  after = over(decoder.resolve)(
      ctx, loop.decoder, queries, p_BQV, jnp.moveaxis(hidden, 1, 0))
  cache = _settle(decoder, ctx, after, cache, done_B)
  cache = sharding.constrain_cache(cache)
  after = _keep_done(done_B, loop.decoder, after)
  return _record(loop, after, cache, done_B)


def decoded(model: Model, loop: LoopState) -> Decoded:
  """What was drawn so far."""
  cells = jnp.asarray(model.grid.slot_of)
  history = None if loop.history is None else loop.history[..., cells]
  return Decoded(loop.decoder.tokens[:, cells], loop.passes,
                 loop.commit_pass[:, cells], history)


def _unstack(x_SD: jax.Array, batch: int) -> jax.Array:
  """[G, B, ...] of rows [S, ...]."""
  return x_SD.reshape(-1, batch, *x_SD.shape[1:])


def _for_each(streams: int, x_B: jax.Array) -> jax.Array:
  """Rows [S, ...] of what the streams of an image share, [B, ...].

  Not a concatenation, for which devices that share rows would exchange parts.
  """
  x_GB = jnp.broadcast_to(x_B, (streams, *x_B.shape))
  return x_GB.reshape(-1, *x_B.shape[1:])


def _over_images(model: Model, function):
  """`function` of one image's context and arrays, over the batch."""
  axes = outline(None, 0, 0, None, None, model)

  def call(ctx, *args):
    return jax.vmap(function, in_axes=(axes, *(0 for _ in args)))(ctx, *args)

  return call


def _silence(queries: Queries, done_B: jax.Array) -> Queries:
  """Queries of images that are done write nowhere."""
  nowhere = queries.visible.shape[-1]
  slots = jnp.where(done_B[:, None], nowhere, queries.slots)
  return queries.replace(slots=slots)


def _settle(
    decoder: Decoder, ctx: Context, state: Any, cache: KVCache,
    done_B: jax.Array,
) -> KVCache:
  """The cache with what is final moved from scratch slots to its own."""
  if not hasattr(decoder, "settle"):
    return cache
  source_BM, target_BM = _over_images(ctx.model, decoder.settle)(ctx, state)
  slots = ctx.model.grid.length + decoder.scratch(ctx.model)
  target_BM = jnp.where(done_B[:, None], slots, target_BM)
  streams, prompt = cache.shape[1], cache.shape[3] - slots
  repeat = lambda x: jnp.tile(x, (streams // len(done_B), 1)) + prompt
  source_SM, target_SM = repeat(source_BM), repeat(target_BM)
  rows = jnp.arange(streams)[:, None]
  move = lambda x: x.at[:, rows, :, target_SM].set(
      x[:, rows, :, source_SM], mode="drop")
  return jax.tree.map(move, cache)


def _keep_done(done_B: jax.Array, before: Any, after: Any) -> Any:
  """The state before for images that are done, else the state after."""
  keep = lambda a, b: jnp.where(
      done_B.reshape(-1, *(1 for _ in a.shape[1:])), a, b
  )
  return jax.tree.map(keep, before, after)


def _record(
    loop: LoopState, state: Any, cache: KVCache, done_B: jax.Array
) -> LoopState:
  """The loop's carry after a pass."""
  passes = jnp.where(done_B, loop.passes, loop.passes + 1)
  is_new = state.final & (loop.commit_pass == 0)
  history = loop.history
  if history is not None:
    at = jnp.minimum(jnp.max(passes), history.shape[1]) - 1
    history = history.at[:, at].set(state.tokens)
  return loop.replace(
      cache=cache, decoder=state, passes=passes, history=history,
      commit_pass=jnp.where(is_new, passes[:, None], loop.commit_pass))
