"""FID, Inception Score and CLIPScore, for machines that reach a model hub.

By torchmetrics, whose networks and weights are those of the literature; the
extra "metrics" installs it. Everywhere else `ssd_jax.metrics` has to do.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from ssd_jax.extras import need

_EXTRA = "metrics"
_BATCH = 16
CLIP = "openai/clip-vit-large-patch14"


@dataclasses.dataclass(frozen=True)
class HubFigures:
  """Figures of one decoder's pictures.

  Attributes:
    fid: Frechet distance in Inception's features, or None without real ones.
    clip: CLIPScore of pictures and prompts: 100 times the mean cosine.
    inception: Inception Score.
  """

  fid: float | None
  clip: float
  inception: float


def compute(
    images: np.ndarray, texts: Sequence[str], real: np.ndarray | None
) -> HubFigures:
  """The figures of pictures.

  Args:
    images: uint8 [N, H, W, 3].
    texts: The prompt of each.
    real: uint8 [M, H, W, 3], pictures of the world, or None. FID depends on how
      many there are: the literature takes 30,000 of each.

  Raises:
    UserError: when the extra is not installed.
  """
  torch = need("torch", _EXTRA)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  clip_module = need("torchmetrics.multimodal.clip_score", _EXTRA)
  clip = clip_module.CLIPScore(CLIP).to(device)
  inception_module = need("torchmetrics.image.inception", _EXTRA)
  inception = inception_module.InceptionScore().to(device)
  fid = None
  if real is not None:
    fid_module = need("torchmetrics.image.fid", _EXTRA)
    fid = fid_module.FrechetInceptionDistance().to(device)
    _update(fid, real, real=True)
    _update(fid, images, real=False)
  _update(inception, images)
  for start in range(0, len(images), _BATCH):
    part = slice(start, start + _BATCH)
    clip.update(_tensor(images[part], device), list(texts[part]))
  return HubFigures(
      None if fid is None else float(fid.compute()), float(clip.compute()),
      float(inception.compute()[0]))


def _update(metric, images: np.ndarray, **kwargs) -> None:
  for start in range(0, len(images), _BATCH):
    part = _tensor(images[start:start + _BATCH], metric.device)
    metric.update(part, **kwargs)


def _tensor(images_NHWC: np.ndarray, device):
  """uint8 [N, 3, H, W] of torch."""
  channels_first = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
  return need("torch", _EXTRA).from_numpy(channels_first).to(device)
