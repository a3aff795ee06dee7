"""SJD and its lossless successors: windows of the model's own latest drafts.

They differ in how the drafts after the first rejection are resampled from their
new targets p:

  SJD           independently from p;
  Coupled       from p with each slot's own Gumbel noise in every pass, or by
                the maximal coupling of old and new draft: test the draft, keep
                it if it is accepted, else resample it from the residual;
  Continuation  by testing all of them as well: the same maximal coupling.
"""

import dataclasses

from ssd_jax.core.config import check
from ssd_jax.decoding.jacobi.window import Jacobi

ACCEPTANCES = ("exact", "equality")
COUPLINGS = ("gumbel", "maximal")


@dataclasses.dataclass(frozen=True)
class SJD(Jacobi):
  """Speculative Jacobi decoding.

  Attributes:
    acceptance: "exact" accepts with probability min(1, p / q); "equality" is
      sampled Jacobi decoding: a draft is accepted if its slot's own noise
      selects it again, and the tokens are AR's.

  Source: Teng et al. 2024, arXiv:2410.01699, algorithm 1.
  """

  acceptance: str = "exact"
  name = "sjd"

  def __post_init__(self):
    super().__post_init__()
    check(self.acceptance in ACCEPTANCES, "acceptance", self.acceptance,
          f"one of {', '.join(ACCEPTANCES)}")


@dataclasses.dataclass(frozen=True)
class Coupled(Jacobi):
  """SJD whose drafts tend to stay equal from pass to pass.

  Attributes:
    coupling: "gumbel" shares each slot's Gumbel noise among its drafts;
      "maximal" makes old and new draft agree as often as their distributions
      allow.

  Source: So et al. 2025, arXiv:2510.24211.
  """

  coupling: str = "gumbel"
  name = "coupled"

  def __post_init__(self):
    super().__post_init__()
    check(self.coupling in COUPLINGS, "coupling", self.coupling,
          f"one of {', '.join(COUPLINGS)}")


@dataclasses.dataclass(frozen=True)
class Continuation(Jacobi):
  """SJD that continues to test drafts after the first rejection.

  Keeping accepted drafts and resampling the others from the residual is the
  maximal coupling of `Coupled`: both publications arrive at one algorithm.

  Source: Kang et al. 2026, arXiv:2603.18599, adaptive continuation (without
  its tree of proactive drafts).
  """

  coupling = "maximal"
  name = "continuation"
