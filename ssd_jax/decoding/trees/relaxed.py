"""Relaxed acceptance in draft trees: LANTERN, LANTERN++ and CASCADE.

All three accept a draft on behalf of other tokens that it may replace. Here
each decoder is one function, the probability mass that a child takes from other
tokens, and all share one definition of the rest, rejection included:

  Mass is transferred: the child gains what the other tokens lose. The child is
  then tested, and the target corrected, by the exact rule, with the modified
  target in place of the target. So if the child is rejected, it and the mass
  that it took are removed, and its siblings can take only what is left.

(The published implementations of LANTERN differ here: one removes all k
neighbours from the target, whether they were counted or not; another removes
them from the drafter's distribution.) A child that the target's filters exclude
takes nothing. The distribution of a token is off by at most the transferred
mass.
"""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.protocols import Needs
from ssd_jax.core.types import Model
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.trees.eagle import Eagle, Siblings

_CHUNK = 1024  # codebook entries whose distances are computed at a time


def neighbour_table(codebook_VE: np.ndarray, count: int) -> np.ndarray:
  """Finds each codebook entry's nearest other entries.

  The table belongs in params["neighbours"], where a pipeline stores it.

  Args:
    codebook_VE: Codebook in the order of image tokens, as it is looked up (of
      unit norm if the tokenizer normalises it).
    count: Neighbours per entry, less than V.

  Returns:
    int32 [V, count], the nearest first.
  """
  entries = np.asarray(codebook_VE, np.float32)
  check(1 <= count < len(entries), "count", count,
        f"in [1, {len(entries) - 1}]")
  squares = np.sum(entries**2, axis=-1)
  rows = []
  for start in range(0, len(entries), _CHUNK):
    part = entries[start:start + _CHUNK]
    distance = squares - 2 * part @ entries.T
    distance[np.arange(len(part)), start + np.arange(len(part))] = np.inf
    near = np.argpartition(distance, count - 1, axis=-1)[:, :count]
    order = np.argsort(np.take_along_axis(distance, near, -1), axis=-1)
    rows.append(np.take_along_axis(near, order, -1))
  return np.concatenate(rows).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Neighbourly(Eagle):
  """A child takes mass from its nearest tokens, limited by a bound."""

  neighbours: int | None = None

  default_neighbours = 0

  def __post_init__(self):
    super().__post_init__()
    check(self.neighbours is None or self.neighbours >= 0, "neighbours",
          self.neighbours, ">= 0")

  def needs(self, model: Model) -> Needs:
    """Returns the drafter and the rows of the table of neighbours."""
    return Needs(drafter=True, neighbours=self._count(model))

  def _count(self, model: Model) -> int:
    """Returns the largest number of neighbours of a token."""
    most = model.vocab - 1
    if self.neighbours is None:
      return min(self.default_neighbours, most)
    check(self.neighbours <= most, "neighbours", self.neighbours,
          f"below the {model.vocab} tokens of the codebook")
    return self.neighbours

  def scratch(self, model: Model) -> int:
    """Returns the number of nodes of the tree."""
    self._count(model)
    return super().scratch(model)

  def _nearest(self, ctx, p_V, token, bound) -> jax.Array:
    """Returns the mass of the nearest tokens while its sum is <= bound, [V]."""
    if "neighbours" not in ctx.params:
      raise UserError(
          f"Expected params['neighbours'] for decoder {self.name}, got params "
          "without a table of neighbouring tokens. Use the params from "
          "Pipeline.params_for."
      )
    near_K = ctx.params["neighbours"][token][:self._count(ctx.model)]
    mass_K = p_V[near_K]
    counted_K = jnp.where(jnp.cumsum(mass_K) <= bound, mass_K, 0.0)
    return jnp.zeros_like(p_V).at[near_K].set(counted_K)


@dataclasses.dataclass(frozen=True)
class Lantern(_Neighbourly):
  """LANTERN: a bound on the total variation of each test.

  Attributes:
    neighbours: Largest number of nearest tokens counted; None is 1000, or all
      others of a smaller codebook.
    delta: Largest mass that a child takes, as a fraction of the mass left.

  Source: Jang et al. 2024, arXiv:2410.03355, section 4.
  """

  tree: str = "dynamic_lantern"
  neighbours: int | None = None
  delta: float = 0.1

  default_neighbours = 1000
  name = "lantern"

  def __post_init__(self):
    super().__post_init__()
    check(0 <= self.delta <= 1, "delta", self.delta, "in [0, 1]")
    self._refuse_coupled()

  @property
  def lossless(self) -> bool:
    """Whether no mass can be transferred."""
    return self.neighbours == 0 or self.delta == 0

  def transferred_mass(
      self, ctx: Context, p_V: jax.Array, siblings: Siblings, child: jax.Array
  ) -> jax.Array:
    """Returns the nearest tokens' mass, at most delta of what is left, [V]."""
    return self._nearest(
        ctx, p_V, siblings.tokens[child], self.delta * jnp.sum(p_V))


@dataclasses.dataclass(frozen=True)
class LanternPP(_Neighbourly):
  """LANTERN++: a bound relative to the child's own probability, static tree.

  Attributes:
    neighbours: Largest number of nearest tokens counted; None is 10, or all
      others of a smaller codebook.
    multiplier: Largest modified probability of a child, as a multiple of its
      own probability.

  Source: Park et al. 2025, arXiv:2502.06352.
  """

  tree: str = "mc_sim"
  drafts: str = "sampled"
  neighbours: int | None = None
  multiplier: float = 5.0

  default_neighbours = 10
  name = "lanternpp"

  def __post_init__(self):
    super().__post_init__()
    check(1 <= self.multiplier < float("inf"), "multiplier", self.multiplier,
          "a number >= 1")
    self._refuse_coupled()

  @property
  def lossless(self) -> bool:
    """Whether no mass can be transferred."""
    return self.neighbours == 0 or self.multiplier == 1

  def transferred_mass(
      self, ctx: Context, p_V: jax.Array, siblings: Siblings, child: jax.Array
  ) -> jax.Array:
    """Returns the nearest tokens' mass, at most (multiplier - 1) p, [V]."""
    token = siblings.tokens[child]
    return self._nearest(ctx, p_V, token, (self.multiplier - 1) * p_V[token])


@dataclasses.dataclass(frozen=True)
class Cascade(Eagle):
  """CASCADE: redundancy in the target's hidden states of the tree pass.

  The paper's exact formulas were not available; this is our reading of it.
  Across the breadth, siblings with similar hidden states are interchangeable: a
  child takes the mass of siblings at a cosine of at least tau_position. Along
  the depth, a child whose hidden state is similar to its parent's has
  converged: at a cosine of at least tau_sequence it takes all mass that is left
  and so is accepted. Hidden states are those of the conditional stream before
  the final norm.

  Attributes:
    tau_position: Threshold of interchangeable siblings; above 1 disables it.
    tau_sequence: Threshold of convergence; above 1 disables it.

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
    """Whether no mass can be transferred."""
    return self.tau_position > 1 and self.tau_sequence > 1

  def transferred_mass(
      self, ctx: Context, p_V: jax.Array, siblings: Siblings, child: jax.Array
  ) -> jax.Array:
    """Returns the interchangeable siblings' mass, or all mass, float32 [V]."""
    del ctx
    states_KD, own_D = _unit(siblings.hidden), _unit(siblings.hidden[child])
    # Rounding may lift the cosine of a state with itself above 1.
    cosine_K = jnp.minimum(states_KD @ own_D, 1.0)
    parent_cosine = jnp.minimum(_unit(siblings.parent) @ own_D, 1.0)
    is_similar_K = siblings.exists & (cosine_K >= self.tau_position)
    mass_K = jnp.where(is_similar_K, p_V[siblings.tokens], 0.0)
    mass_V = jnp.zeros_like(p_V).at[siblings.tokens].add(mass_K)
    return jnp.where(parent_cosine >= self.tau_sequence, p_V, mass_V)


def _unit(x: jax.Array) -> jax.Array:
  """Scales vectors to unit length, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
