"""Run by runtime/test_sharding.py on eight virtual devices.

With the argument `tokens` it only generates, by the decoder of many queries on
the mesh of all axes; its programs are compiled as users compile them.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.core.config import LoopConfig, OptimizerConfig, UserError
from ssd_jax.core.grid import Grid
from ssd_jax.decoding import engine
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.rows.stair import Stair
from ssd_jax.models.drafter import DraftNet
from ssd_jax.models.spatial_heads import HeadsConfig, HeadsOptions, SpatialHeads
from ssd_jax.models.vocabulary import Vocabulary
from ssd_jax.performance import compiled
from ssd_jax.pipeline import testing
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import sharding
from ssd_jax.training import ar, drafter, heads as heads_lib
from ssd_jax.training.self_distillation import Teacher
from ssd_jax.training.state import (
  TrainState,
  apply_gradients,
  make_optimizer,
  mean_gradients,
)

MESH = "data=2,fsdp=2,tensor=2"
APART = ("tensor=4", "data=2,tensor=4")  # where collectives are counted


class Family(testing.TinyFamily):
  """The tiny family with as many key/value heads as devices may share."""

  @functools.cached_property
  def generator(self):
    small = super().generator
    cfg = dataclasses.replace(small.cfg, n_heads=4, n_kv_heads=4, head_dim=4,
                              vocab_out=self.vocab)
    return dataclasses.replace(small, cfg=cfg, rope=small.rope[:, :2])


def make_pipeline():
  family = Family(
      ml_collections.ConfigDict(dict(sampling=dict(
          guidance=2.0, temperature=1.0, top_k=5, top_p=1.0))),
      Vocabulary((), 8), Grid(4, 4, end_of_row=True), 8)
  params = jax.jit(family.generator.init)(jax.random.key(0))
  params["trunk"]["embedding"] *= 30.0
  return Pipeline(family, params, None, family.generator.model())


def arguments(pipe, decoder, texts=("a", "b", "c", "d")):
  """Of `engine.decode`, for an image of each text."""
  settings, guided = pipe.sampling()
  prompt, _ = pipe.family.encode_prompts(list(texts), guided)
  return (pipe.model, decoder, sharding.shard_params(pipe.params),
          sharding.shard_rows(prompt), settings, jax.random.key(3),
          jnp.arange(len(texts)))


def draw(pipe, decoder):
  return np.asarray(engine.decode(*arguments(pipe, decoder)).tokens)


def sent(pipe, mesh):
  """({kind: count} of AR's prefill and one pass, kinds within layers)."""
  mesh = sharding.make_mesh(mesh)
  with jax.set_mesh(mesh):
    text = engine.decode.lower(*arguments(pipe, AR())).compile().as_text()
  within = [kind for line in text.splitlines() for kind in compiled.KINDS
            if "/layers/" in line and f" {kind}(" in line]
  return {
    x.kind: x.count for x in compiled.collectives(text, mesh.size)
  }, within


def trained(pipe, kind, parts):
  """Weights after two steps of the trunk's loss, whole."""
  cfg = OptimizerConfig(kind=kind, warmup_steps=0, ema=0.9)
  optimizer = make_optimizer(cfg, LoopConfig(steps=9))
  state = sharding.create(
      lambda params: TrainState.make(params, optimizer, cfg), pipe.params)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 8, (8, pipe.model.grid.length)).astype(np.int32)
  batch = sharding.global_rows(
      {"tokens": tokens, "inputs": tokens, "prompt": tokens[:, :8],
       "mask": np.ones((8, 8), bool)}, 8)

  @jax.jit
  def step(state, batch):
    loss = lambda params, part: jnp.mean(
        ar.cross_entropy(pipe.family.generator, params, part))
    _, grads = mean_gradients(
        functools.partial(jax.value_and_grad(loss), state.params), batch, parts)
    return apply_gradients(state, grads, optimizer, cfg)

  state = step(step(state, batch), batch)
  return state, sharding.fetch(state.ema)


def distilled(pipe, kind):
  """Weights of heads or of a drafter after two steps on a frozen trunk."""
  trunk = sharding.shard_params({"trunk": pipe.params["trunk"]})
  teacher = Teacher.of(dataclasses.replace(pipe, params=trunk))
  cfg = OptimizerConfig(warmup_steps=0)
  optimizer = make_optimizer(cfg, LoopConfig(steps=9))
  if kind == "heads":
    net = SpatialHeads(teacher.generator, HeadsConfig.make(
        teacher.generator, HeadsOptions(2, 1), trunk))
    step = heads_lib.make_step(
      net, heads_lib.MTPConfig(optimizer=cfg), optimizer
    )
  else:
    net = DraftNet(teacher.generator)
    step = drafter.make_step(
        net, teacher, drafter.DrafterTraining(optimizer=cfg, noise=0.0),
        optimizer)
  state = sharding.create(
      lambda key: TrainState.make(net.init(key), optimizer, cfg),
      jax.random.key(1))
  prompt, _ = teacher.encode_prompts(list("abcdefgh"), kind == "drafter")
  grid = pipe.model.grid
  drawn = np.random.default_rng(0).integers(0, 8, (8, grid.length))
  tokens = np.where(grid.is_forced, grid.forced_tokens(8), drawn)
  batch = sharding.global_rows(
      {"prompt": prompt, "tokens": tokens.astype(np.int32)}, 8)
  for _ in range(2):
    state, _ = step(teacher.params, state, batch)
  return sharding.fetch(state.params)


def places(state):
  """{path: which axes cut it} of a training state's larger arrays."""
  found = {}
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    if x.ndim > 1:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      found[name] = str(tuple(x.sharding.spec))
  return found


def on_cores(pipe):
  """What two devices of a CPU do with one guided image: on how many each
  decoder runs, the share of tokens that Stair generates on one alone, what a
  pass of it sends, in how many places the weights lie.
  """
  prompt, _ = pipe.family.encode_prompts(["a"], True)
  devices = {}
  for decoder in (AR(), Stair()):
    mesh = pipe.programs.mesh_for(decoder, prompt, pipe.sampling()[0], 1)
    devices[decoder.name] = mesh and mesh.size
  with jax.set_mesh(sharding.make_mesh("data=1")):
    alone = pipe.generate(["a"], Stair(), seed=4).tokens
  together = pipe.generate(["a"], Stair(), seed=4).tokens
  mesh = sharding.make_mesh("data=2")
  lent = sharding.replicate(jnp.ones((64, 64)), mesh)
  places = {x.data.unsafe_buffer_pointer() for x in lent.addressable_shards}
  args = arguments(pipe, Stair(), ["a"])
  with jax.set_mesh(mesh):
    text = (
      engine.decode.lower(
        *args[:2],
        sharding.replicate(args[2], mesh),
        sharding.shard_rows(args[3]),
        *args[4:],
      )
      .compile()
      .as_text()
    )
  sent = [(x.kind, x.count) for x in compiled.collectives(text, 2)]
  return {"devices": devices, "sent": sent, "places": len(places),
          "share": float((together == alone).mean())}


def distance(one, other):
  gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, other)
  return max(jax.tree.leaves(gaps))


def main():
  pipe, found = make_pipeline(), {}
  found["sent"] = {mesh: sent(pipe, mesh) for mesh in APART}
  found["cores"] = on_cores(testing.tiny(7, 4, 4, guidance=2.0, heads=(2, 1)))
  kinds = ("heads", "drafter")
  weights = {"muon": trained(pipe, "muon", 1)[1]}
  weights |= {kind: distilled(pipe, kind) for kind in kinds}
  found["accumulated"] = distance(weights["muon"], trained(pipe, "muon", 2)[1])
  with jax.set_mesh(sharding.make_mesh(MESH)):
    state, own = trained(pipe, "muon", 1)
    found["step"] = max(
        distance(own, weights["muon"]),
        *(distance(distilled(pipe, kind), weights[kind]) for kind in kinds))
    found["places"] = places(state)
  try:
    with jax.set_mesh(sharding.make_mesh("tensor=8")):
      sharding.shard_params(pipe.params)
  except UserError as error:
    found["error"] = str(error)
  print(json.dumps(found))


def same_tokens(pipe, *decoders):
  """Returns, by decoder, the share of tokens that one device generates too."""
  alone = [draw(pipe, decoder) for decoder in decoders]
  with jax.set_mesh(sharding.make_mesh(MESH)):
    return [float((draw(pipe, decoder) == expected).mean())
            for decoder, expected in zip(decoders, alone, strict=True)]


if __name__ == "__main__":
  if sys.argv[1:] == ["tokens"]:
    print(json.dumps(same_tokens(make_pipeline(), Stair())))
  else:
    main()
