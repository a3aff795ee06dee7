"""Continuous refill: who is done leaves the batch, who waits takes the place.

  empty     a batch of which no place is taken
  admit     prefills one prompt into a free place
  advance   runs passes until somebody is done, or a number of them is made

Three programs of static shapes. Each image has its own number of passes and its
own noise, so it becomes what `engine.decode` draws, whoever is beside it.
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
  """A batch of free places: zeros that count as done.

  Args:
    model: The network's functions; static.
    decoder: Settings; static.
    params: Of the network.
    prompt: Of any one image: the shapes of all that will be admitted.
    sampling: Of the target distribution.
    batch: Places; static.
  """
  call = engine.outline(jax.random.key(0), None, None, params, sampling, model)
  rows = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), prompt)
  begin = functools.partial(engine.begin, decoder, call)
  shapes = jax.eval_shape(begin, rows, jnp.zeros(batch, jnp.int32))
  loop = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  final = jnp.ones_like(loop.decoder.final)
  return _in_place(loop.replace(decoder=loop.decoder.replace(final=final)))


@functools.partial(
    jax.jit, static_argnames=("model", "decoder"), donate_argnames="loop")
def insert(
    model: Model, decoder: Decoder, params: Params, prompt: Prompt,
    sampling: Sampling, key: jax.Array, loop: LoopState, image: jax.Array,
    place: jax.Array,
) -> LoopState:
  """The batch with one more image, after its prefill, in a free place.

  Args:
    model: The network's functions; static.
    decoder: Settings; static.
    params: Of the network.
    prompt: Of one image; as wide as the batch's.
    sampling: Of the target distribution.
    key: Of the call.
    loop: The batch; donated.
    image: int32 [], index over the whole call.
    place: int32 [], in the batch.
  """
  call = engine.outline(key, None, None, params, sampling, model)
  new = engine.begin(decoder, call, prompt, image[None])
  batch = len(loop.image)

  def put(axis, old, new):
    for stream in range(new.shape[axis]):
      row = jax.lax.slice_in_dim(new, stream, stream + 1, axis=axis)
      old = jax.lax.dynamic_update_slice_in_dim(
          old, row.astype(old.dtype), stream * batch + place, axis)
    return old

  cache = jax.tree.map(functools.partial(put, 1), loop.cache, new.cache)
  loop, new = loop.replace(cache=None), new.replace(cache=None)
  loop = jax.tree.map(functools.partial(put, 0), loop, new)
  return _in_place(loop.replace(cache=cache))


@functools.partial(
    jax.jit, static_argnames=("model", "decoder"), donate_argnames="loop")
def advance(
    model: Model, decoder: Decoder, params: Params, sampling: Sampling,
    key: jax.Array, loop: LoopState, most: jax.Array,
) -> tuple[LoopState, Decoded, jax.Array]:
  """(the batch when one more of its images is done, what is drawn, who is).

  Args:
    model: The network's functions; static.
    decoder: Settings; static.
    params: Of the network.
    sampling: Of the target distribution.
    key: Of the call.
    loop: The batch; donated.
    most: int32 [], passes after which it returns, though nobody is done.
  """
  call = engine.outline(key, None, None, params, sampling, model)
  done_B = loop.is_done
  nobody_new = lambda loop: jnp.all(loop.is_done == done_B)
  _, loop = jax.lax.while_loop(
      lambda x: (x[0] < most) & ~jnp.all(x[1].is_done) & nobody_new(x[1]),
      lambda x: (x[0] + 1, engine.step(decoder, call, x[1])),
      (jnp.int32(0), loop))
  return _in_place(loop), engine.decoded(model, loop), loop.is_done


def widen(prompt: Prompt, slots: int) -> Prompt:
  """Prompts of at least `slots` slots; what is added to the left is unseen."""
  extra = max(slots - prompt.tokens.shape[1], 0)
  return jax.tree.map(lambda x: _pad_left(x, 1, extra), prompt)


def widen_batch(loop: LoopState, slots: int) -> LoopState:
  """A batch with at least `slots` prompt slots."""
  extra = max(slots - loop.prompt.tokens.shape[1], 0)
  return loop.replace(
      prompt=widen(loop.prompt, slots),
      cache=jax.tree.map(lambda x: _pad_left(x, 3, extra), loop.cache))


def _pad_left(x: jax.Array, axis: int, extra: int) -> jax.Array:
  widths = [(extra if i == axis else 0, 0) for i in range(x.ndim)]
  return jnp.pad(x, widths) if extra else x


def _in_place(loop: LoopState) -> LoopState:
  """Inside jit: where a batch lies on the mesh, the same after each program."""
  rest = sharding.constrain_rows(loop.replace(cache=None))
  return rest.replace(cache=sharding.constrain_cache(loop.cache))
