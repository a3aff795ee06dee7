"""Quality of generated images, compared with AR's for the same prompts.

N images, P prompts, F features.
"""

from collections.abc import Sequence
import dataclasses
import pathlib

import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.images import Images, OnDemand
from ssd_jax.data import folder as folder_lib, sources
from ssd_jax.data.pictures import hash_fraction, to_square
from ssd_jax.evaluation import efficientnet, metrics
from ssd_jax.evaluation.metrics import Estimate, Gap
from ssd_jax.evaluation.run_store import Run

_Z = 1.96  # standard errors of a 95% interval


@dataclasses.dataclass(frozen=True)
class References:
  """What images are compared with besides AR's.

  Attributes:
    real_MF: Features of real images, or None.
    real_M: The emoji that each of these shows, or None if unknown.
    gallery_MF: Features of all emoji, or None.
    target_N: The emoji that each image's prompt names, -1 for none.
  """

  real_MF: np.ndarray | None
  real_M: np.ndarray | None
  gallery_MF: np.ndarray | None
  target_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class Quality:
  """Figures of one decoder; None for what could not be computed.

  Attributes:
    nll: Mean negative log-likelihood under the model, in nats/token.
    gap: nll minus the first AR's, with its 95% interval.
    excess: Mean of NLL minus entropy, in nats/token, with its error.
    extra: The same minus the first AR's, prompt by prompt.
    fd_real: Frechet distance in EfficientNet-Lite0's features to real images.
    kid_real: Kernel distance in those features to real images.
    fd_ar: Frechet distance to the first AR's images.
    kid_ar: Kernel distance to them.
    recall: Share of images whose nearest emoji is the requested one.
    recall_10: Share for which it is among the ten nearest.
    within_ar: Whether it is within AR's own spread; see `is_within_spread`.
  """

  nll: float
  gap: Gap | None
  excess: Estimate
  extra: Estimate | None
  fd_real: float | None = None
  kid_real: Estimate | None = None
  fd_ar: float | None = None
  kid_ar: Estimate | None = None
  recall: float | None = None
  recall_10: float | None = None
  within_ar: bool | None = None


def assess(
    runs: Sequence[Run], ar: int | None, rerun: int | None, num_images: int,
    features_RNF: Sequence[np.ndarray] | None, references: References,
) -> list[Quality]:
  """Returns the quality of each run.

  Args:
    runs: Runs of the same prompts.
    ar: Index of the first AR run, or None.
    rerun: Index of the first AR run with another seed, or None.
    num_images: Images per prompt.
    features_RNF: Features of each run's images, or None without a network.
    references: What else they are compared with.
  """
  found = []
  for index, run in enumerate(runs):
    base = None if ar is None else runs[ar]
    quality = _likelihoods(run, base, num_images)
    if features_RNF is not None:
      own_NF = features_RNF[index]
      other_NF = None if ar in (None, index) else features_RNF[ar]
      quality = dataclasses.replace(
          quality, **_pictures(own_NF, other_NF, references, num_images))
    found.append(quality)
  spread = None if rerun is None else found[rerun].gap
  if rerun is None or spread is None or spread.interval is None:
    return found  # the spread is unknown
  return [
      q if index == ar else dataclasses.replace(
          q, within_ar=is_within_spread(q, found[rerun], index == rerun))
      for index, q in enumerate(found)]


def is_within_spread(
    quality: Quality, rerun: Quality, is_rerun: bool = False
) -> bool:
  """Returns whether a decoder is within AR's own spread.

  All of these must hold, with the AR run of another seed as the yardstick:
    its likelihood gap is no further from 0 than the farther end of the 95%
      interval of the yardstick's;
    so is its excess over AR's;
    its kernel distance to AR's images exceeds the yardstick's by no more than
      1.96 standard errors of the difference, where both are known.
  The yardstick itself is held to its own intervals: 0 must lie in them.
  """
  if not (rerun.gap and rerun.gap.interval and rerun.extra
          and rerun.extra.error is not None and quality.gap and quality.extra):
    raise ValueError("the spread of AR is unknown")
  gap_ends = rerun.gap.interval
  width = _Z * rerun.extra.error
  extra_ends = (rerun.extra.value - width, rerun.extra.value + width)
  if is_rerun:
    return all(low <= 0 <= high for low, high in (gap_ends, extra_ends))
  near = abs(quality.gap.value) <= max(map(abs, gap_ends))
  near &= abs(quality.extra.value) <= max(map(abs, extra_ends))
  if quality.kid_ar is not None and rerun.kid_ar is not None:
    error = np.hypot(quality.kid_ar.error or 0, rerun.kid_ar.error or 0)
    near &= quality.kid_ar.value - rerun.kid_ar.value <= _Z * error
  return bool(near)


def _likelihoods(run: Run, base: Run | None, num_images: int) -> Quality:
  """Returns likelihood figures, images of a prompt averaged."""
  nll_P = _per_prompt(run.nll, num_images)
  entropy_P = _per_prompt(run.entropy, num_images)
  gap = extra = None
  if base is not None:
    base_P = _per_prompt(base.nll, num_images)
    gap = metrics.likelihood_gap(nll_P, base_P, seed=0)
    base_excess_P = base_P - _per_prompt(base.entropy, num_images)
    # Mean and error of one excess minus the other.
    extra = metrics.excess((nll_P - entropy_P)[:, None], base_excess_P[:, None])
  return Quality(
      float(run.nll.mean()), gap,
      metrics.excess(nll_P[:, None], entropy_P[:, None]), extra)


def _per_prompt(x_N: np.ndarray, num_images: int) -> np.ndarray:
  return x_N.reshape(-1, num_images).mean(1)


def _pictures(
    own_NF: np.ndarray, ar_NF: np.ndarray | None, references: References,
    num_images: int,
) -> dict:
  """The figures of `Quality` that come from features."""
  found: dict[str, float | Estimate] = {}
  real_MF, prompt_N = references.real_MF, np.arange(len(own_NF)) // num_images
  target_N = references.target_N
  # A prompt that names no emoji shares its subject with no other.
  shown_N = np.where(target_N < 0, -1 - prompt_N, target_N)
  if real_MF is not None and min(len(own_NF), len(real_MF)) >= 2:
    found["fd_real"] = metrics.frechet_distance(own_NF, real_MF)
    names = references.real_M is not None and (shown_N, references.real_M)
    found["kid_real"] = metrics.kernel_distance(
        own_NF, real_MF, names=names or None)
  if ar_NF is not None and len(own_NF) >= 2:
    found["fd_ar"] = metrics.frechet_distance(own_NF, ar_NF)
  if ar_NF is not None and prompt_N[-1] >= 1:
    found["kid_ar"] = metrics.kernel_distance(
        own_NF, ar_NF, names=(prompt_N, prompt_N))
  is_named_N = target_N >= 0
  if references.gallery_MF is not None and is_named_N.any():
    ranks = metrics.retrieval_ranks(
        own_NF[is_named_N], references.gallery_MF, target_N[is_named_N])
    found["recall"] = metrics.recall_at(ranks, 1)
    found["recall_10"] = metrics.recall_at(ranks, 10)
  return found


def emoji_targets(texts: Sequence[str]) -> np.ndarray:
  """Returns the gallery index of the emoji that each text names, or -1."""
  records = sources.EmojiSource("all").records
  places = {record.label: i for i, record in reversed([*enumerate(records)])}
  return np.array([places.get(" ".join(text.split()), -1)
                   for text in texts])


def emoji_captions(split: str | None) -> list[str]:
  """Returns captions of the vendored emoji, the held-out ones first.

  Within a split they are ordered by a hash, so that the first few are a fair
  sample: the emoji themselves begin with all flags.

  Args:
    split: "train" or "validation" for one of them only.
  """
  splits = [split] if split else ["validation", "train"]
  labels = []
  for name in splits:
    records = sources.EmojiSource(name).records
    labels += sorted((r.label for r in records), key=hash_fraction)
  return list(dict.fromkeys(labels))


class FolderPictures(OnDemand):
  """The real images below a folder, cropped square, read on demand.

  Raises:
    UserError: if there are fewer than two, or one cannot be read.
  """

  def __init__(self, folder: str, pixels: int = efficientnet.INPUT_SIZE):
    files = folder_lib.find_pictures(pathlib.Path(folder))
    super().__init__(files, lambda file: folder_lib.read(
        file, lambda picture: to_square(picture, pixels)))
    if len(files) < 2:
      raise UserError(
          f"Expected two or more images, got {len(files)} images in "
          f"--real_images {folder}. Check the folder.")
    folder_lib.check_headers(files)


def make_references(
    texts: Sequence[str], real: Images | None
) -> References:
  """Returns what images are compared with: real ones and the emoji gallery.

  Args:
    texts: The prompt of each image.
    real: Real images; None for the emoji that prompts name.
  """
  target_N = emoji_targets(texts)
  gallery_MF = places = None
  if (target_N >= 0).any():
    gallery_MF = metrics.emoji_gallery()
    if real is None:
      source = sources.EmojiSource("all")
      places = np.unique(target_N[target_N >= 0])
      real = np.stack([source[int(i)]["image"] for i in places])
  real_MF = None if real is None else efficientnet.image_features(real)
  return References(real_MF, places, gallery_MF, target_N)
