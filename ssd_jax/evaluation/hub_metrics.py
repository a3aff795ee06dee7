"""FID, Inception Score and CLIPScore, for machines that reach a model hub.

torchmetrics computes them with the networks and weights of the literature; the
extra "metrics" installs it. On other machines, use
`ssd_jax.evaluation.metrics`.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.extras import need
from ssd_jax.core.images import Images

_EXTRA = "metrics"
_BATCH = 16
CLIP = "openai/clip-vit-large-patch14"


@dataclasses.dataclass(frozen=True)
class HubFigures:
  """Figures of one decoder's images.

  Attributes:
    fid: Frechet distance in Inception's features; None without real images.
    clip: CLIPScore of images and prompts, 100 times the mean cosine.
    inception: Inception Score.
  """

  fid: float | None
  clip: float
  inception: float


def compute(
    images: Images, texts: Sequence[str],
    real: Images | None,
) -> HubFigures:
  """Returns the figures of generated images.

  Args:
    images: N images whose slices are uint8 [n, H, W, 3].
    texts: The prompt of each image.
    real: Real images, or None. FID depends on the number of images: the
      literature uses 30,000 generated and 30,000 real images.

  Raises:
    UserError: if the extra is not installed or the hub is unreachable.
  """
  clip = _make("torchmetrics.multimodal.clip_score", "CLIPScore", CLIP)
  inception = _make("torchmetrics.image.inception", "InceptionScore")
  fid = None
  if real is not None:
    fid = _make("torchmetrics.image.fid", "FrechetInceptionDistance")
    _update(fid, real, real=True)
    _update(fid, images, real=False)
  _update(inception, images)
  for start in range(0, len(images), _BATCH):
    part = slice(start, start + _BATCH)
    clip.update(_tensor(images[part], clip.device), list(texts[part]))
  return HubFigures(
      None if fid is None else float(fid.compute()), float(clip.compute()),
      float(inception.compute()[0]))


def check_installed() -> None:
  """Raises UserError if the extra is not installed."""
  for module in ("torch", "torch_fidelity", "torchmetrics", "transformers"):
    need(module, _EXTRA)


def _make(module: str, name: str, *args):
  """Returns a metric with its network on the device.

  Raises:
    UserError: if the extra is not installed or the hub is unreachable.
  """
  torch = need("torch", _EXTRA)
  try:
    metric = getattr(need(module, _EXTRA), name)(*args)
  except OSError as error:  # raised by downloads of the hub and of urllib
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(
        "Expected a machine that reaches the model hub, got no network for "
        f"{name} ({reason[:160]}). Start again on such a machine or without "
        "--hub_metrics, generated images are kept.") from error
  return metric.to("cuda" if torch.cuda.is_available() else "cpu")


def _update(metric, images: Images, **kwargs) -> None:
  for start in range(0, len(images), _BATCH):
    part = _tensor(images[start:start + _BATCH], metric.device)
    metric.update(part, **kwargs)


def _tensor(images_NHWC: np.ndarray, device):
  """Returns images as a torch tensor, uint8 [N, 3, H, W]."""
  channels_first = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
  return need("torch", _EXTRA).from_numpy(channels_first).to(device)
