"""Cost of the images that train.mtp generates before its first step.

Memory and time are those of one pass, compiled for devices that may be absent.
Refilling keeps the batch full, so an image takes its share of each pass, and a
prefill of its own, during which all others wait.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from ssd_jax.core.config import from_config_dict
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding import registry
from ssd_jax.decoding.ar import AR
from ssd_jax.evaluation import quality
from ssd_jax.performance import (
  chips,
  compiled,
  cost_model as planning,
  pass_counts,
)
from ssd_jax.runtime import sharding
from ssd_jax.training.self_distillation import GenerationConfig

_RESERVE = 0.95  # share of the memory that may be used


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
  """Images generated with one decoder on one mesh, a batch at a time.

  Attributes:
    network: The network.
    decoder: Settings of the decoder.
    mesh: Mesh of the devices.
    chip: Figures of each device.
    batch: Images together, over all devices; the one that is compiled.
  """

  network: planning.Network
  decoder: Decoder
  mesh: Mesh
  chip: chips.Chip
  batch: int

  @functools.cached_property
  def _compiled(self) -> tuple[list[compiled.Collective], int]:
    """(collectives of a pass, bytes of its temporaries on a device)."""
    plan = self._plan(self.batch)
    one, ends = plan.compile_pass()
    layers = self.network.generator.cfg.n_layers
    return (planning.sent_by(one, ends, layers, self.mesh.size),
            one.memory_analysis().temp_size_in_bytes)

  def _plan(self, batch: int, decoder: Decoder | None = None) -> planning.Plan:
    return planning.Plan(
        self.network, decoder or self.decoder, self.mesh, batch)

  def memory(self, batch: int) -> int:
    """Returns the bytes per device: weights, cache and a pass's temporaries."""
    plan = self._plan(batch)
    cfg = self.network.generator.cfg
    shape = (cfg.n_layers, plan.streams * batch, cfg.n_kv_heads, plan.slots,
             cfg.head_dim)
    cache = sharding.cache_spec(shape, self.mesh)
    size = np.dtype(self.network.generator.dtype).itemsize
    parts = math.prod(
        self.mesh.shape[axis] for axes in cache if axes
        for axis in ((axes,) if isinstance(axes, str) else axes))
    weights = sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(plan.params))
    temporaries = self._compiled[1] * batch // self.batch
    return (weights + plan.stacked_bytes + temporaries
            + 2 * size * math.prod(shape) // parts)

  def largest(self) -> int:
    """Returns the largest batch whose memory fits, 0 if none does."""
    step = self.even(1)
    room = _RESERVE * self.chip.memory
    count, most = 0, 1
    while self.memory(most * step) <= room:
      count, most = most, 2 * most
    while most - count > 1:
      middle = (count + most) // 2
      if self.memory(middle * step) <= room:
        count = middle
      else:
        most = middle
    return count * step

  def even(self, batch: int) -> int:
    """Returns the smallest batch >= `batch` that the mesh shards evenly."""
    streams = self._plan(batch).streams
    with jax.set_mesh(self.mesh):  # nothing may run here
      return sharding.even_batch(batch, streams)

  def image_seconds(
      self, batch: int, passes: float, decoder: Decoder | None = None
  ) -> float:
    """Returns the least seconds per image.

    Args:
      batch: Images together.
      passes: Passes of an image, with its prefill.
      decoder: Another decoder than the one that was compiled, which sends in
        proportion to its queries.
    """
    plan, base = self._plan(batch, decoder), self._plan(self.batch)
    grown = batch / self.batch
    sent = [dataclasses.replace(x, bytes=int(x.bytes * grown))
            for x in self._compiled[0]]
    scale = plan.queries / base.queries
    waits = sum(
        dataclasses.replace(x, bytes=int(x.bytes * scale)).seconds(
            self.chip.link, chips.HOP_SECONDS) for x in sent)
    return (passes - 1) * (self._least(plan, plan.queries) + waits) / batch + (
        self._prefill())

  def _prefill(self) -> float:
    """Returns the least seconds in which one prompt is read."""
    plan = self._plan(1)
    # One prompt is not shared: all rows of the mesh read the same.
    return self._least(
        plan, plan.prompt.tokens.shape[1], sharding.num_row_shards(self.mesh))

  def _least(
      self, plan: planning.Plan, queries: int, repeats: int = 1
  ) -> float:
    flops, moved = plan.counts(queries)
    each = repeats / self.mesh.size
    return max(flops * each / self.chip.flops,
               moved / self.mesh.size / self.chip.bandwidth)


def num_images(config: ml_collections.ConfigDict) -> int | None:
  """Returns the number of images that a config generates, held-out ones too.

  None if it reads all prompts of a file, however many these are.
  """
  prompts = config.num_prompts
  if not prompts and config.get("classes"):
    prompts = config.classes
  if not prompts and config.family == "emoji":
    prompts = len(quality.emoji_captions("train"))
  return prompts * config.images_per_caption or None


def report(
    network: planning.Network, config: ml_collections.ConfigDict, mesh: Mesh,
    chip: chips.Chip, passes: float | None = None,
) -> Mapping[str, Any]:
  """Returns the plan of the images as JSON values.

  Args:
    network: The network.
    config: Config of the command.
    mesh: Mesh of the devices.
    chip: Figures of each device.
    passes: Measured passes of an image; None takes what the grid fixes or, for
      a decoder whose passes depend on the image, what the embedded model would.
  """
  cfg = from_config_dict(GenerationConfig, config.mtp.draw)
  decoder, images = registry.parse(cfg.decoder), num_images(config)
  drawing = Drawing(network, decoder, mesh, chip, 1)
  drawing = dataclasses.replace(drawing, batch=drawing.even(cfg.batch))
  of_ar = pass_counts.of_ar(network.model)
  fixed = pass_counts.fixed_passes(decoder, network.model)
  assumed = passes is None and fixed is None
  passes = passes or fixed or pass_counts.assumed(decoder, network.model)
  hours = lambda seconds: images and round(images * seconds / 3600, 3)

  def of(batch: int) -> dict[str, Any]:
    return {
        "hours": hours(drawing.image_seconds(batch, passes)),
        "hours_by_ar": hours(drawing.image_seconds(batch, of_ar, AR()))}

  memory, largest = drawing.memory(drawing.batch), drawing.largest()
  return {
      "images": images, "draw_decoder": registry.text(decoder),
      "draw_passes": passes, "draw_passes_assumed": assumed,
      "draw_batch": {
          "batch": drawing.batch, "memory_per_device": memory,
          "fits": memory <= chip.memory, **of(drawing.batch)},
      "draw_largest_batch": {
          "batch": largest, **(of(largest) if largest else {})},
      "draw_hours": of(drawing.batch)["hours"]}
