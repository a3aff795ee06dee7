"""Continuous batching: a finished image frees its slot for the next prompt.

  init      makes a batch of free slots
  insert    prefills one prompt into a free slot
  advance   runs passes until an image finishes or a pass limit is reached
  evict     frees the slot of an image that nobody waits for any more

These are four programs with static shapes. Each image has its own pass count,
its own noise and its own settings, so its tokens equal those of
`engine.decode`, whichever images share the batch.
"""

import functools

import jax
import jax.numpy as jnp

from ssd_jax.core.types import Model, Params, Prompt
from ssd_jax.decoding import engine
from ssd_jax.decoding.engine import Decoded, Decoder, LoopState
from ssd_jax.decoding.sampling import Sampling
from ssd_jax.runtime import sharding


@functools.partial(jax.jit, static_argnames=("model", "decoder", "batch"))
def init(
    model: Model, decoder: Decoder, params: Params, prompt: Prompt,
    sampling: Sampling, batch: int,
) -> LoopState:
  """Returns a batch of free slots: zero-filled states marked as done.

  Args:
    model: The network's functions; static.
    decoder: Decoder settings; static.
    params: Parameters of the network.
    prompt: The prompt of any one image; later prompts must have its shapes.
    sampling: Settings of any one image; later ones must have its filters.
    batch: Number of slots; static.
  """
  begin = functools.partial(engine.begin_image, model, decoder)
  key = jax.random.key(0)
  one = jax.eval_shape(begin, params, prompt, sampling, key, jnp.int32(0))

  def rows(axis, x):
    before, after = x.shape[:axis], x.shape[axis + 1:]
    return jnp.zeros((*before, x.shape[axis] * batch, *after), x.dtype)

  cache = jax.tree.map(functools.partial(rows, 1), one.cache)
  loop = jax.tree.map(
      functools.partial(rows, 0), one.replace(cache=None, key=None))
  loop = loop.replace(cache=cache, key=jnp.broadcast_to(key, (batch,)))
  final = jnp.ones_like(loop.decoder.final)
  return _in_place(loop.replace(decoder=loop.decoder.replace(final=final)))


@functools.partial(
    jax.jit, static_argnames=("model", "decoder"), donate_argnames="loop")
def insert(
    model: Model, decoder: Decoder, params: Params, prompt: Prompt,
    sampling: Sampling, key: jax.Array, loop: LoopState, image: jax.Array,
    slot: jax.Array,
) -> LoopState:
  """Prefills one image and writes it to a free slot of the batch.

  Args:
    model: The network's functions; static.
    decoder: Decoder settings; static.
    params: Parameters of the network.
    prompt: The prompt of one image, with as many prompt slots as the batch.
    sampling: Settings of the target distribution of this image.
    key: Random key of this image.
    loop: The batch; donated.
    image: int32 [], index of the image over the whole call.
    slot: int32 [], position in the batch.

  Returns:
    The batch after the image's prefill.
  """
  new = engine.begin_image(
      model, decoder, params, prompt, sampling, key, image)
  batch = len(loop.image)

  def put(axis, old, new):
    for stream in range(new.shape[axis]):
      row = jax.lax.slice_in_dim(new, stream, stream + 1, axis=axis)
      old = jax.lax.dynamic_update_slice_in_dim(
          old, row.astype(old.dtype), stream * batch + slot, axis)
    return old

  cache = jax.tree.map(functools.partial(put, 1), loop.cache, new.cache)
  loop, new = loop.replace(cache=None), new.replace(cache=None)
  loop = jax.tree.map(functools.partial(put, 0), loop, new)
  return _in_place(loop.replace(cache=cache))


@functools.partial(
    jax.jit, static_argnames=("model", "decoder"), donate_argnames="loop")
def advance(
    model: Model, decoder: Decoder, params: Params, loop: LoopState,
    max_passes: jax.Array,
) -> tuple[LoopState, Decoded, jax.Array]:
  """Runs passes until another image finishes or `max_passes` have run.

  Args:
    model: The network's functions; static.
    decoder: Decoder settings; static.
    params: Parameters of the network.
    loop: The batch; donated.
    max_passes: int32 [], limit on the number of passes.

  Returns:
    The batch, the tokens decoded so far, and which images are done, bool [B].
  """
  template = engine.template_context(None, None, None, params, None, model)
  done_B = loop.is_done
  none_finished = lambda loop: jnp.all(loop.is_done == done_B)
  _, loop = jax.lax.while_loop(
      lambda x: (
          (x[0] < max_passes) & ~jnp.all(x[1].is_done) & none_finished(x[1])),
      lambda x: (x[0] + 1, engine.step(decoder, template, x[1])),
      (jnp.int32(0), loop))
  return _in_place(loop), engine.decoded(model, loop), loop.is_done


@functools.partial(
    jax.jit, static_argnames=("model", "decoder"), donate_argnames="loop")
def evict(
    model: Model, decoder: Decoder, params: Params, loop: LoopState,
    slot: jax.Array,
) -> LoopState:
  """Evicts a cancelled image, which frees its slot.

  Args:
    model: The network's functions; static.
    decoder: Decoder settings; static.
    params: Parameters of the network, which are not read.
    loop: The batch; donated.
    slot: int32 [], position in the batch.
  """
  del model, decoder, params
  final = loop.decoder.final.at[slot].set(True)
  return _in_place(loop.replace(decoder=loop.decoder.replace(final=final)))


def widen(prompt: Prompt, slots: int) -> Prompt:
  """Pads prompts on the left to at least `slots` slots; padding is masked."""
  extra = max(slots - prompt.tokens.shape[1], 0)
  return jax.tree.map(lambda x: _pad_left(x, 1, extra), prompt)


def widen_batch(loop: LoopState, slots: int) -> LoopState:
  """Pads a batch on the left to at least `slots` prompt slots."""
  extra = max(slots - loop.prompt.tokens.shape[1], 0)
  return loop.replace(
      prompt=widen(loop.prompt, slots),
      cache=jax.tree.map(lambda x: _pad_left(x, 3, extra), loop.cache))


def _pad_left(x: jax.Array, axis: int, extra: int) -> jax.Array:
  widths = [(extra if i == axis else 0, 0) for i in range(x.ndim)]
  return jnp.pad(x, widths) if extra else x


def _in_place(loop: LoopState) -> LoopState:
  """Gives a batch the same sharding after each program; call inside jit."""
  rest = sharding.constrain_rows(loop.replace(cache=None))
  return rest.replace(cache=sharding.constrain_cache(loop.cache))
