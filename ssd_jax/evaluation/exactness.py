"""Exactness by enumeration: is a decoder's joint distribution AR's?

On a tiny grid all images can be enumerated and their exact probabilities
computed. Many images are sampled with the decoder and counted. A chi-square
test says how likely such counts are under the exact distribution; the total
variation distance says how far off they are, beside what an exact sampler would
show with as many samples.

Images are sampled in groups, which also detects a decoder whose images
influence each other.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
from scipy import optimize, stats

from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding import engine
from ssd_jax.decoding.acceptance import Drafts
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.jacobi.sjd import SJD
from ssd_jax.pipeline import testing
from ssd_jax.pipeline.pipeline import Pipeline

PROMPT = "ab"
LEAST_EXPECTED = 5.0  # counts per bin; rarer images share one
P_VALUE = 1e-3  # below it a claim of exactness is refuted
GROUPS = (1, 4)
_TOGETHER = 5000  # images per call of a program


@dataclasses.dataclass(frozen=True)
class Finding:
  """The test of one decoder.

  Attributes:
    label: The decoder as it was asked for.
    lossless: Whether it claims to be lossless.
    group: Images decoded together.
    draws: Images sampled in all.
    tv: Total variation distance of the counts from the exact distribution.
    floor: The distance that an exact sampler shows on average.
    p_value: The p-value of the chi-square test.
    passes: Mean forward passes per image.
  """

  label: str
  lossless: bool
  group: int
  draws: int
  tv: float
  floor: float
  p_value: float
  passes: float

  @property
  def verdict(self) -> str:
    """The result in words."""
    if self.p_value >= P_VALUE:
      return "exact" if self.lossless else "not distinguishable"
    return "BIASED" if self.lossless else "relaxed"

  @property
  def is_sound(self) -> bool:
    """Whether the claim holds."""
    return not self.lossless or self.p_value >= P_VALUE


@dataclasses.dataclass(frozen=True)
class Control(SJD):
  """SJD that is biased on purpose, to show that the test detects it.

  Every draft must be accepted twice, as happens in lock-step batches to drafts
  that an image accepted but could not commit.
  """

  name = "control"

  def accept(
      self, ctx: Context, p_QV: jax.Array, drafts: Drafts, u_Q: jax.Array
  ) -> jax.Array:
    """Returns bool [Q]: which drafts are accepted both times."""
    return super().accept(ctx, p_QV, drafts, jnp.sqrt(u_Q))


def enumerate_distribution(
    pipe: Pipeline, prompt: str = PROMPT
) -> tuple[np.ndarray, np.ndarray]:
  """Returns all images, int32 [I, R, C], and probabilities, float64 [I]."""
  images = testing.every_image(pipe)
  log_p_I = pipe.log_prob(images, [prompt] * len(images))
  p_I = np.exp(log_p_I.astype(np.float64))
  if abs(p_I.sum() - 1) > 1e-3:
    raise AssertionError(f"probabilities of all images sum to {p_I.sum()}")
  return images, p_I / p_I.sum()


def sample_images(
    pipe: Pipeline, decoder: Decoder, draws: int, group: int = 1,
    seed: int = 0, prompt: str = PROMPT,
) -> engine.Decoded:
  """Samples at least `draws` images of one prompt, decoded `group` at a time.

  Thousands of groups run side by side in one program. Groups do not see each
  other.
  """
  settings, guided = pipe.sampling()
  rows, _ = pipe.family.encode_prompts([prompt] * group, guided)
  params = pipe.programs.params_for(decoder)

  @jax.jit
  def run(index_KG):
    return jax.vmap(lambda image_G: engine.decode(
        pipe.model, decoder, params, rows, settings,
        jax.random.key(seed), image_G))(index_KG)

  calls = -(-draws // _TOGETHER)
  size = -(-draws // (calls * group))
  index = jnp.arange(calls * size * group).reshape(calls, size, group)
  parts = [jax.tree.map(np.asarray, run(index_KG)) for index_KG in index]
  return jax.tree.map(
      lambda *x: np.concatenate(x).reshape(index.size, *x[0].shape[2:]), *parts)


def count(pipe: Pipeline, tokens: ArrayLike) -> np.ndarray:
  """Returns counts of images, int [I], as `enumerate_distribution` orders."""
  images = np.asarray(tokens)
  tokens_IT = images.reshape(len(images), -1)
  powers_T = pipe.model.vocab ** np.arange(tokens_IT.shape[1])[::-1]
  return np.bincount(
      tokens_IT @ powers_T, minlength=pipe.model.vocab ** tokens_IT.shape[1])


def chi_square(found_I: np.ndarray, p_I: np.ndarray) -> float:
  """Returns the p-value of counts under a distribution, rare images pooled.

  It is zero if an image without any probability was sampled.
  """
  if found_I[p_I == 0].sum():
    return 0.0
  found, expected = pool(found_I, p_I * found_I.sum())
  return float(stats.chisquare(found, expected).pvalue)


def pool(
    found_I: np.ndarray, expected_I: np.ndarray, least: float = LEAST_EXPECTED
) -> tuple[np.ndarray, np.ndarray]:
  """Merges bins, the rarest first, until each expects `least` counts.
  """
  order = np.argsort(expected_I, kind="stable")
  total = np.cumsum(expected_I[order])
  bins, start = [], 0.0
  for index, end in enumerate(total):
    if end - start >= least:
      bins.append(index + 1)
      start = end
  # The last full bin takes what is left.
  edges = np.array([0, *bins[:-1]])
  return (np.add.reduceat(found_I[order], edges),
          np.add.reduceat(expected_I[order], edges))


def total_variation(found_I: np.ndarray, p_I: np.ndarray) -> float:
  """Returns half the sum of |frequency - probability|."""
  return float(0.5 * np.abs(found_I / found_I.sum() - p_I).sum())


def noise_floor(p_I: np.ndarray, draws: int) -> float:
  """Returns the total variation distance that an exact sampler shows on
  average.

  It is half the sum of the mean absolute deviations of binomials, by de
  Moivre's closed form.
  """
  mode_I = np.floor(draws * p_I) + 1
  deviation_I = 2 * mode_I * (1 - p_I) * stats.binom.pmf(mode_I, draws, p_I)
  return float(0.5 * deviation_I.sum() / draws)


def detectable(p_I: np.ndarray, draws: int, power: float = 0.9) -> float:
  """Returns the total variation distance that the test detects with this power.

  The bias assumed changes every image's probability by the same share, up or
  down at random; a bias on few images is detected at a smaller distance. Among
  pooled images part of it cancels.
  """
  squares, expected = pool(p_I**2, p_I * draws)
  left = float((squares / expected).sum() * draws)
  freedom = len(expected) - 1
  threshold = stats.chi2.isf(P_VALUE, freedom)
  shift = optimize.brentq(
      lambda shift: stats.ncx2.sf(threshold, freedom, shift) - power,
      1e-3, 1e3 + 10 * threshold)
  return float(0.5 * np.sqrt(shift / draws / left))


def examine(
    pipe: Pipeline, decoder: Decoder, label: str, draws: int = 20_000,
    group: int = 1, seed: int = 0,
) -> Finding:
  """Tests a decoder with `draws` images."""
  _, p_I = enumerate_distribution(pipe)
  out = sample_images(pipe, decoder, draws, group, seed)
  found_I = count(pipe, out.tokens)
  size = int(found_I.sum())
  return Finding(
      label, decoder.is_lossless(pipe.model.grid), group, size,
      total_variation(found_I, p_I), noise_floor(p_I, size),
      chi_square(found_I, p_I), float(out.passes.mean()),
  )


def table(findings: list[Finding]) -> str:
  """Returns a Markdown table of findings."""
  lines = [
      "| decoder | claims lossless | group | passes | TV | noise "
      "floor | p-value | verdict |",
      "|---|---|---|---|---|---|---|---|",
  ]
  for f in findings:
    claim = "yes" if f.lossless else "no"
    lines.append(
        f"| {f.label} | {claim} | {f.group} | {f.passes:.2f} | {f.tv:.4f} | "
        f"{f.floor:.4f} | {f.p_value:.3g} | {f.verdict} |")
  return "\n".join(lines) + "\n"


def sensitivity(pipe: Pipeline, draws: int) -> str:
  """Returns a legend of the table, with what the test can detect."""
  _, p_I = enumerate_distribution(pipe)
  grid, seen = pipe.model.grid, detectable(p_I, draws)
  return (
      f"\n{draws} samples each of the {len(p_I)} images of a grid of "
      f"{grid.rows} x {grid.cols} tokens with {pipe.model.vocab} values; "
      f"defaults are "
      "limited to it. *group*: images decoded together. *TV*: total variation "
      "distance from the exact distribution; *noise floor*: what an exact "
      f"sampler shows on average. *p-value*: of a chi-square test; below "
      f"{P_VALUE:g} a claim of exactness is refuted. *control*: sjd biased on "
      "purpose (each draft is tested twice), which the test must refute. A "
      "bias spread evenly over all images is detected 9 times in 10 at a "
      f"distance of {seen:.3f}.\n")
