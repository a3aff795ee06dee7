"""Grouped speculative decoding: SJD that tests clusters of similar tokens."""

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
  """SJD that accepts a draft if its cluster is accepted; not lossless.

  The cluster of a draft consists of the tokens next to it in rank under the
  target whose probabilities and input embeddings are close to the draft's. An
  accepted cluster keeps the draft itself; a rejected draft is resampled from
  its own residual.

  Attributes:
    group: Largest number of tokens in a cluster, the draft included; 1 is SJD.
    max_gap: Bound on the difference of their probabilities.
    max_distance: Bound on the squared distance of their input embeddings.

  Source: So et al. 2025, arXiv:2508.07747; the defaults are those of its code.
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
    """Whether all clusters are single tokens."""
    return self.group == 1

  def accept(
      self, ctx: Context, p_QV: jax.Array, drafts: Drafts, u_Q: jax.Array
  ) -> jax.Array:
    """Returns which drafts are accepted with their clusters, bool [Q]."""
    members_QG, exists_QG = acceptance.rank_neighbours(
        p_QV, drafts.tokens, self._size(ctx.model.vocab)
    )
    p_QG = jnp.take_along_axis(p_QV, members_QG, axis=-1)
    embedding_QGD = ctx.model.embed(ctx.params, members_QG).astype(jnp.float32)
    gap_QG = jnp.abs(p_QG - p_QG[:, :1])
    distance_QG = jnp.sum((embedding_QGD - embedding_QGD[:, :1]) ** 2, axis=-1)
    is_near_QG = (gap_QG < self.max_gap) & (distance_QG < self.max_distance)
    is_near_QG = is_near_QG.at[:, 0].set(True)
    return acceptance.accept_group(
        p_QV, drafts, u_Q, members_QG, is_near_QG & exists_QG
    )

  def _size(self, vocab: int) -> int:
    """Returns `group`; the default is clamped to the vocabulary."""
    if self.group > vocab and self.group != type(self).group:
      raise UserError(
          f"Expected group to be at most {vocab} (the vocabulary), "
          f"got group={self.group}."
      )
    return min(self.group, vocab)
