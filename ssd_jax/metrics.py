"""How good generated pictures are, without a model hub.

Three views: the model's own likelihood of what a decoder drew, the distance of
two sets of pictures in EfficientNet-Lite0's features, and whether the picture
drawn for a caption lies nearest to the real emoji of that caption. The distance
is not the FID of the literature, which needs Inception features: call it
FD-EffNetLite0 and compare it with itself only, at equal numbers of images.

N, M pictures, F features, P positions.
"""

import hashlib
import io
import os
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from ssd_jax import features
from ssd_jax.config import check
from ssd_jax.data import sources


class Estimate(NamedTuple):
  """A mean and its standard error, None where one sample tells nothing."""

  value: float
  error: float | None


class Gap(NamedTuple):
  """A mean difference and its 95% interval, None for a single prompt."""

  value: float
  interval: tuple[float, float] | None


def likelihood_gap(
    nll_decoder_N: np.ndarray,
    nll_ar_N: np.ndarray,
    seed: int,
    resamples: int = 10_000,
) -> Gap:
  """How much less likely a decoder's images are than AR's, in nats per token.

  Above zero: damaged. Below zero: collapsed towards the likely.

  Args:
    nll_decoder_N: Per prompt, the mean negative log-likelihood of an output's
      tokens under the model's target distribution.
    nll_ar_N: The same of AR samples for the same prompts, in the same order.
    seed: Of the bootstrap, which resamples prompts and keeps pairs together.
    resamples: Of the bootstrap.
  """
  difference_N = np.asarray(nll_decoder_N, np.float64) - np.asarray(
      nll_ar_N, np.float64
  )
  value = float(difference_N.mean())
  if len(difference_N) < 2:
    return Gap(value, None)
  rng = np.random.default_rng(seed)
  count = len(difference_N)
  # Only how often each prompt is drawn matters: one multinomial per resample.
  weights_KN = rng.multinomial(count, np.full(count, 1 / count), resamples)
  low, high = np.quantile(weights_KN @ difference_N / count, [0.025, 0.975])
  return Gap(value, (float(low), float(high)))


def excess(nll_NP: np.ndarray, entropy_NP: np.ndarray) -> Estimate:
  """Mean over positions of NLL minus entropy, with its error over images.

  Zero in expectation for every exact sampler: unlike the gap it needs no AR
  samples and is free of the noise of what happened to be drawn. It is blind to
  lost diversity.

  Args:
    nll_NP: Negative log-probability of each drawn token under the target
      distribution at its position, in nats.
    entropy_NP: Entropy of that same distribution.
  """
  excess_N = (np.asarray(nll_NP, np.float64) - entropy_NP).mean(1)
  error = None
  if len(excess_N) > 1:
    error = float(excess_N.std(ddof=1) / np.sqrt(len(excess_N)))
  return Estimate(float(excess_N.mean()), error)


def frechet_distance(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
  """The Frechet distance of two Gaussians fitted to two sets of features.

  |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). With C = X^T X, the
  eigenvalues of C_a C_b that are not zero are the squared singular values of
  X_a X_b^T; their sum of roots needs no root of a matrix and holds for fewer
  images than features too.

  It is biased upwards at small N: compare it at equal numbers of images.

  Raises:
    UserError: with fewer than two images on a side.

  Source: Dowson and Landau 1982, The Frechet distance between multivariate
  normal distributions, eq. 4; Heusel et al. 2017, arXiv:1706.08500, eq. 6.
  """
  mean_a_F, x_NF = _centred_root(a_NF)
  mean_b_F, x_MF = _centred_root(b_MF)
  cross = np.linalg.svd(x_NF @ x_MF.T, compute_uv=False).sum()
  spread = np.square(x_NF).sum() + np.square(x_MF).sum() - 2 * cross
  return float(np.square(mean_a_F - mean_b_F).sum() + max(spread, 0.0))


def _centred_root(x_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and a root X of the covariance X^T X, at most F rows of it."""
  count, width = x_NF.shape
  check(count >= 2, "images", count, "at least 2 for a Frechet distance")
  x_NF = np.asarray(x_NF, np.float64)
  mean_F = x_NF.mean(0)
  root_NF = (x_NF - mean_F) / np.sqrt(count - 1)
  if count > width:
    root_NF = np.linalg.qr(root_NF, mode="r")
  return mean_F, root_NF


def kernel_distance(
    a_NF: np.ndarray, b_MF: np.ndarray, subsets: int = 10
) -> Estimate:
  """The unbiased squared MMD with a cubic kernel (KID), and its error.

  The error is a jackknife that leaves out one of `subsets` equal parts of both
  sets at a time; it needs four images on a side.

  Raises:
    UserError: with fewer than two images on a side.

  Source: Binkowski et al. 2018, arXiv:1801.01401, section 4.
  """
  check(
      min(len(a_NF), len(b_MF)) >= 2, "images", min(len(a_NF), len(b_MF)),
      "at least 2 for a kernel distance",
  )
  a_NF, b_MF = np.asarray(a_NF, np.float64), np.asarray(b_MF, np.float64)
  kernels = (_cubic(a_NF, a_NF), _cubic(b_MF, b_MF), _cubic(a_NF, b_MF))
  value = _mmd(*kernels, np.ones(len(a_NF)), np.ones(len(b_MF)))
  count = min(subsets, len(a_NF) // 2, len(b_MF) // 2)
  if count < 2:
    return Estimate(value, None)
  part_N = np.arange(len(a_NF)) * count // len(a_NF)
  part_M = np.arange(len(b_MF)) * count // len(b_MF)
  left_out = [
      _mmd(*kernels, 1.0 * (part_N != i), 1.0 * (part_M != i))
      for i in range(count)
  ]
  return Estimate(value, float(np.sqrt((count - 1) * np.var(left_out))))


def _cubic(a_NF: np.ndarray, b_MF: np.ndarray) -> np.ndarray:
  return (a_NF @ b_MF.T / a_NF.shape[1] + 1) ** 3


def _mmd(
    k_NN: np.ndarray,
    k_MM: np.ndarray,
    k_NM: np.ndarray,
    keep_N: np.ndarray,
    keep_M: np.ndarray,
) -> float:
  """The unbiased squared MMD of the kept rows, without the diagonals."""
  n, m = keep_N.sum(), keep_M.sum()
  same_a = (keep_N @ k_NN @ keep_N - keep_N @ np.diag(k_NN)) / (n * (n - 1))
  same_b = (keep_M @ k_MM @ keep_M - keep_M @ np.diag(k_MM)) / (m * (m - 1))
  return float(same_a + same_b - 2 * (keep_N @ k_NM @ keep_M) / (n * m))
