"""Grouped speculative decoding: SJD that tests clusters of like tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError, check
from ssd_jax.decoding import acceptance
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.jacobi.window import Jacobi


@dataclasses.dataclass(frozen=True)
class GSD(Jacobi):
  """SJD in which a draft passes with its cluster; not lossless.

  A draft's cluster are the tokens next to it in rank under the target that are
  about as probable and look alike. What passes is the draft itself; what fails
  is redrawn from the token's own residual.

  Attributes:
    group: Tokens of a cluster at most, the draft among them; 1 is SJD.
    max_gap: Bound on the difference of their probabilities.
    max_distance: Bound on the squared distance of their input embeddings.

  Source: So et al. 2025, arXiv:2508.07747; the defaults are its code's.
  """

  group: int = 14
  max_gap: float = 0.15
  max_distance: float = 0.5
  name = "gsd"

  def __post_init__(self):
    super().__post_init__()
    check(self.group >= 1, "group", self.group, ">= 1")
    check(self.max_gap >= 0, "max_gap", self.max_gap, ">= 0")
    check(self.max_distance >= 0, "max_distance", self.max_distance, ">= 0")

  @property
  def lossless(self) -> bool:
    """Whether clusters are single tokens."""
    return self.group == 1

  def accept(
      self, ctx: Context, p_QV: jax.Array, drafts: Drafts, u_Q: jax.Array
  ) -> jax.Array:
    """bool [Q]: whether the cluster of each draft passes."""
    members_QG, exists_QG = acceptance.rank_neighbours(
        p_QV, drafts.tokens, self._size(ctx.model.vocab)
    )
    p_QG = jnp.take_along_axis(p_QV, members_QG, axis=-1)
    code_QGD = ctx.model.embed(ctx.params, members_QG).astype(jnp.float32)
    gap_QG = jnp.abs(p_QG - p_QG[:, :1])
    distance_QG = jnp.sum((code_QGD - code_QGD[:, :1]) ** 2, axis=-1)
    is_near_QG = (gap_QG < self.max_gap) & (distance_QG < self.max_distance)
    is_near_QG = is_near_QG.at[:, 0].set(True)
    return acceptance.accept_group(
        p_QV, drafts, u_Q, members_QG, is_near_QG & exists_QG
    )

  def _size(self, vocab: int) -> int:
    """`group`; the default is clamped to the vocabulary."""
    if self.group > vocab and self.group != type(self).group:
      raise UserError(
          f"got group={self.group}, expected at most the vocabulary, {vocab}; "
          "make group smaller"
      )
    return min(self.group, vocab)
