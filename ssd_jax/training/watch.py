"""Decoding with heads in training: passes and excess NLL on fixed prompts.

Acceptance on finished images does not say how heads decode: a decoder's own
rounds feed them other states.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.config import check
from ssd_jax.core.protocols import Decoder
from ssd_jax.core.types import Model, Params
from ssd_jax.decoding import engine, registry
from ssd_jax.pipeline import likelihood
from ssd_jax.runtime import sharding
from ssd_jax.training.self_distillation import GeneratedTokens, Teacher

_SEED = 0


@dataclasses.dataclass(frozen=True)
class WatchConfig:
  """Settings of decoding in training.

  Attributes:
    every: Steps between two measurements; 0 for none.
    prompts: Held-out prompts, the first ones.
    decoders: Decoders, as NAME:key=value; () is the one that the heads are for.
  """

  every: int = 0
  prompts: int = 8
  decoders: tuple[str, ...] = ()

  def __post_init__(self):
    check(self.every >= 0, "watch.every", self.every, ">= 0")
    check(self.prompts >= 1, "watch.prompts", self.prompts, ">= 1")
    for name in self.decoders:
      registry.parse(name)


def decoders_of(model: Model, cfg: WatchConfig) -> dict[str, Decoder]:
  """Returns the decoders by the names of the settings.

  Raises:
    UserError: if one needs what the model lacks.
  """
  names = cfg.decoders or ("ssd" if model.heads[1] else "mtp",)
  decoders = {name: registry.parse(name) for name in names}
  for name, decoder in decoders.items():
    missing = decoder.needs(model).missing(model)
    check(not missing, "watch.decoders", name, f"one that needs no {missing}")
  return decoders


def make_watch(
    model: Model, teacher: Teacher, held_out: GeneratedTokens, cfg: WatchConfig
) -> Callable[[Params], dict[str, float]]:
  """Returns a function of the heads' parameters that decodes and measures.

  Its figures, by decoder: passes per image, and the excess NLL over the
  held-out images of these prompts, whose decoder is lossless, in nats/token.

  Args:
    model: The network's functions, the heads among them.
    teacher: The frozen trunk.
    held_out: Images of the held-out prompts.
    cfg: Settings.
  """
  decoders = decoders_of(model, cfg)
  count = min(cfg.prompts, len(held_out))
  token_nll = likelihood.token_nll(teacher.generator)
  slots_RC = model.grid.slot_of

  def prompts():
    return sharding.shard_rows(
        held_out.prompts(teacher, np.arange(count), teacher.guided))

  def excess(prompt, sequence_BN) -> float:
    nll, entropy = sharding.fetch(token_nll(
        teacher.params, prompt, sharding.shard_rows(jnp.asarray(sequence_BN)),
        teacher.sampling))
    return float(np.mean(nll - entropy))

  def watch(heads: Params) -> dict[str, float]:
    prompt, figures = prompts(), {}
    sequence_BN = held_out.sequences(np.arange(count))
    base = excess(prompt, sequence_BN)
    for name, decoder in decoders.items():
      out = sharding.fetch(engine.decode(
          model, decoder, {**teacher.params, "heads": heads}, prompt,
          teacher.sampling, jax.random.key(_SEED), jnp.arange(count)))
      sequence_BN[:, slots_RC] = out.tokens
      figures[f"{name}/passes"] = float(np.mean(out.passes))
      figures[f"{name}/excess_nll"] = excess(prompt, sequence_BN) - base
    return figures

  return watch
