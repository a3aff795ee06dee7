"""Cost of a step of train.mtp on devices that may be absent."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from ssd_jax.core.config import check, from_config_dict
from ssd_jax.models.spatial_heads import HeadsConfig, SpatialHeads
from ssd_jax.performance import (
  chips,
  compiled as compiled_lib,
  cost_model as planning,
  image_cost,
)
from ssd_jax.runtime import sharding
from ssd_jax.training import heads as heads_lib
from ssd_jax.training.state import TrainState, make_optimizer

_RESERVE = 0.95  # share of the memory that may be used


def compile_step(
    network: planning.Network, cfg: heads_lib.MTPConfig, mesh: Mesh
) -> Any:
  """Returns the compiled step of `cfg.loop.batch` images."""
  heads = SpatialHeads(
      network.generator, HeadsConfig.make(network.generator, cfg.heads))
  optimizer = make_optimizer(cfg.optimizer, cfg.loop)
  make = lambda key: TrainState.make(
      heads.init(key), optimizer, cfg.optimizer)
  state = jax.eval_shape(make, jax.random.key(0))
  state = planning.abstract(state, sharding.shardings(state, mesh))
  trunk = {"trunk": network.params["trunk"]}
  trunk = planning.abstract(trunk, sharding.shardings(trunk, mesh))
  batch = {
      "prompt": network.prompt(cfg.loop.batch, False),
      "tokens": jax.ShapeDtypeStruct(
          (cfg.loop.batch, network.model.grid.length), np.int32)}
  batch = planning.abstract(batch, planning.rows_of(batch, mesh))
  with jax.set_mesh(mesh):
    return heads_lib.make_step(heads, cfg, optimizer).lower(
        trunk, state, batch).compile()


def counts(network: planning.Network, cfg: heads_lib.MTPConfig) -> float:
  """Returns the FLOPs of a step, counted by hand."""
  return heads_lib.step_flops(
      network.generator, network.params["trunk"], network.params["heads"],
      network.prompt(1, False).tokens.shape[1], cfg.loop.batch)


def report(
    network: planning.Network, config: ml_collections.ConfigDict, mesh: Mesh,
    chip: chips.Chip, batch: int | None,
) -> dict:
  """Returns the plan of the steps as JSON values.

  Args:
    network: The network.
    config: Config of the command.
    mesh: Mesh of the devices.
    chip: Figures of each device.
    batch: Images per step; None for the config's.

  Raises:
    UserError: if the batch does not divide over the mesh.
  """
  cfg = from_config_dict(heads_lib.MTPConfig, config.mtp)
  batch = cfg.loop.batch if batch is None else batch
  check(batch >= 1, "batch", batch, ">= 1")
  parts = sharding.num_row_shards(mesh)
  check(batch % parts == 0, "batch", batch,
        f"a multiple of data x fsdp = {parts}")
  compiled = functools.cache(lambda images: _compiled(
      network, with_batch(cfg, images), mesh))
  memory, most = largest(
      lambda images: compiled(images)[1], parts, _RESERVE * chip.memory)
  # A batch that does not fit at once is accumulated over parts that fit.
  each = max((n for n in range(parts, batch + 1, parts)
              if batch % n == 0 and n <= most), default=0)
  fits = each > 0
  program, planned = compiled(each or parts)
  sent = compiled_lib.collectives(program.as_text(), mesh.size) if fits else []
  flops = counts(network, with_batch(cfg, batch))
  repeats = batch // each if fits else 1
  waits = repeats * sum(
      x.seconds(chip.link, chips.HOP_SECONDS) for x in sent)
  seconds = flops / mesh.size / chip.flops + waits
  hours = seconds * cfg.loop.steps / 3600
  return {
      "decoder": None, "settings": {}, "batch": batch,
      "accumulate": repeats if fits else None,
      "parameters": planning.count(network.params["trunk"]),
      "trained_parameters": planning.count(network.params["heads"]),
      "memory_per_device": planned if fits else memory,
      "fits": fits, "largest_batch": most, "bytes_per_pass": None,
      "flops_per_pass": int(flops),
      "collectives": {x.kind: {"count": x.count * repeats,
                               "bytes": x.bytes * repeats} for x in sent},
      "roofline_ms": {}, "passes": None, "image_seconds": None, "best": None,
      "step_seconds": round(seconds, 4), "steps": cfg.loop.steps,
      "train_hours": round(hours, 4),
  }


def whole(
    network: planning.Network, config: ml_collections.ConfigDict, mesh: Mesh,
    chip: chips.Chip, batch: int | None, passes: float | None = None,
) -> dict[str, Any]:
  """Returns the plan of train.mtp, images and then steps, as JSON values.

  Args:
    network: The network.
    config: Config of the command.
    mesh: Mesh of the devices.
    chip: Figures of each device.
    batch: Images per step; None for the config's.
    passes: Measured passes of an image; see `image_cost.report`.
  """
  found = report(network, config, mesh, chip, batch)
  found |= image_cost.report(network, config, mesh, chip, passes)
  hours = found["draw_hours"] and found["draw_hours"] + found["train_hours"]
  price = chip.dollars and mesh.size * chip.dollars
  return found | {
      "hours": hours and round(hours, 3),
      "dollars": hours and price and round(hours * price, 2)}


def with_batch(cfg: heads_lib.MTPConfig, batch: int) -> heads_lib.MTPConfig:
  """Returns the settings with another batch and without accumulation."""
  return dataclasses.replace(cfg, loop=dataclasses.replace(
      cfg.loop, batch=batch, accumulate=1))


def _compiled(network, cfg, mesh: Mesh) -> tuple[Any, int]:
  """Returns (step, bytes per device); the step is None if it does not fit."""
  try:
    program = compile_step(network, cfg, mesh)
    return program, planning.memory_of(program)
  except jax.errors.JaxRuntimeError as error:
    used = planning.out_of_memory(error)
    if used is None:
      raise
    return None, used


def largest(
    needed: Callable[[int], int], parts: int, room: float
) -> tuple[int, int]:
  """Returns (bytes of the smallest batch, largest batch that fits).

  Memory is nearly linear in the batch, so two programs give a first guess. If
  it does not fit, bisection and interpolation alternate below it until the
  bounds are within an eighth of each other.

  Args:
    needed: Returns the bytes per device of a batch; compiles once per batch.
    parts: Batches are multiples of this number.
    room: Bytes available per device.
  """
  one, two = needed(parts), needed(2 * parts)
  if one > room:
    return one, 0
  fits, over = 1, 1 + math.floor((room - one) / max(two - one, 1))
  if needed(over * parts) <= room:
    return one, over * parts
  share = 0.5
  while over - fits > max(1, fits // 8):
    tried = fits + max(1, int(share * (over - fits)))
    if needed(tried * parts) <= room:
      fits = tried
    else:
      over = tried
    low, high = needed(fits * parts), needed(over * parts)
    share = 0.5 if share != 0.5 else (room - low) / (high - low)
  return one, fits * parts
