"""Relaxed acceptance in draft trees: LANTERN, LANTERN++ and CASCADE.

All three let a draft pass for other tokens that it may stand for. Here each is
one function, the probability mass that a child takes from other tokens, and one
definition of the rest, rejection included:

  The mass moves: what the child gains, the others lose. The child is then
  tested, and the target corrected, by the exact rule, with the moved target in
  place of the target. So if the child fails, it and what it stood for are gone,
  and its siblings have what is left to take from.

(The published codes of LANTERN differ here from each other: one removes all k
neighbours, whether they were counted or not, from the target, another removes
them from the drafter's distribution.) A child that the target's filters exclude
takes nothing. The law of a token is off by at most the mass that moved.
"""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.types import Model
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.trees.eagle import Eagle, Family

_CHUNK = 1024  # codes whose distances are held at once


def neighbour_table(codebook_VE: np.ndarray, count: int) -> np.ndarray:
  """int32 [V, count]: each code's nearest others, the nearest first.

  It belongs in params["neighbours"], where a pipeline puts it by itself.

  Args:
    codebook_VE: The tokenizer's codes in the order of image tokens, as they are
      looked up (of length one where the tokenizer normalises them).
    count: Neighbours per code, below V.
  """
  codes = np.asarray(codebook_VE, np.float32)
  check(1 <= count < len(codes), "count", count, f"in [1, {len(codes) - 1}]")
  squares = np.sum(codes**2, axis=-1)
  rows = []
  for start in range(0, len(codes), _CHUNK):
    part = codes[start:start + _CHUNK]
    distance = squares - 2 * part @ codes.T
    distance[np.arange(len(part)), start + np.arange(len(part))] = np.inf
    near = np.argpartition(distance, count - 1, axis=-1)[:, :count]
    order = np.argsort(np.take_along_axis(distance, near, -1), axis=-1)
    rows.append(np.take_along_axis(near, order, -1))
  return np.concatenate(rows).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Neighbourly(Eagle):
  """A child may stand for the codes nearest to it, as far as a bound allows."""

  neighbours: int = 0

  def __post_init__(self):
    super().__post_init__()
    check(self.neighbours >= 0, "neighbours", self.neighbours, ">= 0")

  def scratch(self, model: Model) -> int:
    """The nodes of the tree."""
    is_default = self.neighbours == type(self).neighbours
    check(
        is_default or self.neighbours < model.vocab, "neighbours",
        self.neighbours, f"below the {model.vocab} codes",
    )
    return super().scratch(model)

  def _nearest(self, ctx, p_V, token, bound) -> jax.Array:
    """float32 [V]: mass of the nearest codes while their sum is <= bound."""
    if "neighbours" not in ctx.params:
      raise UserError(
          f"got decoder {self.name} and a model without a table of "
          "neighbouring codes, expected params['neighbours']; take the params "
          "from Pipeline.params_for"
      )
    near_K = ctx.params["neighbours"][token][:self.neighbours]
    mass_K = p_V[near_K]
    counted_K = jnp.where(jnp.cumsum(mass_K) <= bound, mass_K, 0.0)
    return jnp.zeros_like(p_V).at[near_K].set(counted_K)


@dataclasses.dataclass(frozen=True)
class Lantern(_Neighbourly):
  """LANTERN: a bound on the total variation of each test.

  Attributes:
    neighbours: Codes counted at most.
    delta: Most mass that a child takes, as a share of what is left.

  Source: Jang et al. 2024, arXiv:2410.03355, section 4.
  """

  tree: str = "dynamic_lantern"
  neighbours: int = 1000
  delta: float = 0.1

  name = "lantern"

  def __post_init__(self):
    super().__post_init__()
    check(0 <= self.delta <= 1, "delta", self.delta, "in [0, 1]")
    self._refuse_coupled()

  @property
  def lossless(self) -> bool:
    """Only where nothing can move."""
    return self.neighbours == 0 or self.delta == 0

  def taken(
      self, ctx: Context, p_V: jax.Array, family: Family, child: jax.Array
  ) -> jax.Array:
    """float32 [V]: mass of the nearest codes, at most delta of what is left."""
    return self._nearest(
        ctx, p_V, family.tokens[child], self.delta * jnp.sum(p_V))


@dataclasses.dataclass(frozen=True)
class LanternPP(_Neighbourly):
  """LANTERN++: a bound relative to the child's own probability, static tree.

  Attributes:
    neighbours: Codes counted at most.
    multiplier: A child counts for at most this times its probability.

  Source: Park et al. 2025, arXiv:2502.06352.
  """

  tree: str = "mc_sim"
  drafts: str = "sampled"
  neighbours: int = 10
  multiplier: float = 5.0

  name = "lanternpp"

  def __post_init__(self):
    super().__post_init__()
    check(1 <= self.multiplier < float("inf"), "multiplier", self.multiplier,
          "a number >= 1")
    self._refuse_coupled()

  @property
  def lossless(self) -> bool:
    """Only where nothing can move."""
    return self.neighbours == 0 or self.multiplier == 1

  def taken(
      self, ctx: Context, p_V: jax.Array, family: Family, child: jax.Array
  ) -> jax.Array:
    """float32 [V]: mass of the nearest codes, at most (multiplier - 1) p."""
    token = family.tokens[child]
    return self._nearest(ctx, p_V, token, (self.multiplier - 1) * p_V[token])


@dataclasses.dataclass(frozen=True)
class Cascade(Eagle):
  """CASCADE: redundancy that the target's hidden states show in the tree pass.

  The paper's exact formulas are not at hand; this is our reading. Across the
  breadth, siblings whose hidden states agree are interchangeable: a child takes
  the mass of its siblings at a cosine of tau_position or more. Along the depth,
  a child whose hidden state agrees with its parent's has converged: at a cosine
  of tau_sequence or more it takes all that is left, and so passes. States are
  those before the final norm, of the conditional stream.

  Attributes:
    tau_position: Threshold of interchangeable siblings; above 1 is never.
    tau_sequence: Threshold of convergence; above 1 is never.

  Source: CASCADE, arXiv:2605.07230, section 4 and appendix C.
  """

  tau_position: float = 0.9
  tau_sequence: float = 0.95

  name = "cascade"

  def __post_init__(self):
    super().__post_init__()
    for name in ("tau_position", "tau_sequence"):
      value = getattr(self, name)
      is_number = isinstance(value, numbers.Real) and np.isfinite(value)
      check(is_number, name, repr(value), "a number, above 1 for never")
    self._refuse_coupled()

  @property
  def lossless(self) -> bool:
    """Only where nothing can move."""
    return self.tau_position > 1 and self.tau_sequence > 1

  def taken(
      self, ctx: Context, p_V: jax.Array, family: Family, child: jax.Array
  ) -> jax.Array:
    """float32 [V]: the interchangeable siblings' mass, or all of it."""
    del ctx
    states_KD, own_D = _unit(family.hidden), _unit(family.hidden[child])
    # Rounding may lift the cosine of a state with itself above 1.
    likeness_K = jnp.minimum(states_KD @ own_D, 1.0)
    likeness = jnp.minimum(_unit(family.parent) @ own_D, 1.0)
    is_like_K = family.exists & (likeness_K >= self.tau_position)
    mass_K = jnp.where(is_like_K, p_V[family.tokens], 0.0)
    taken_V = jnp.zeros_like(p_V).at[family.tokens].add(mass_K)
    return jnp.where(likeness >= self.tau_sequence, p_V, taken_V)


def _unit(x: jax.Array) -> jax.Array:
  """float32 vectors of length one."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
