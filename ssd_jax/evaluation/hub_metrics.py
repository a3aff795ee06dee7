"""FID, Inception Score and CLIPScore, for machines that reach a model hub.

By torchmetrics, whose networks and weights are those of the literature; the
extra "metrics" installs it. Elsewhere `ssd_jax.evaluation.metrics` has to do.
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
    fid: Frechet distance in Inception's features, or None without real ones.
    clip: CLIPScore of images and prompts: 100 times the mean cosine.
    inception: Inception Score.
  """

  fid: float | None
  clip: float
  inception: float


def compute(
    images: Images, texts: Sequence[str],
    real: Images | None,
) -> HubFigures:
  """The figures of images.

  Args:
    images: N images whose slices are uint8 [n, H, W, 3].
    texts: The prompt of each.
    real: Images of the world, or None. FID depends on how many there are: the
      literature takes 30,000 of each.

  Raises:
    UserError: when the extra is not installed.
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
  """Raises UserError unless the extra is installed."""
  for module in ("torch", "torch_fidelity", "torchmetrics", "transformers"):
    need(module, _EXTRA)


def _make(module: str, name: str, *args):
  """A metric with its network, on the device.

  Raises:
    UserError: when the extra is not installed or the hub is out of reach.
  """
  torch = need("torch", _EXTRA)
  try:
    metric = getattr(need(module, _EXTRA), name)(*args)
  except OSError as error:  # of the hub's and of urllib's downloads alike
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(
        "Expected a machine that reaches the model hub, got no network for "
        f"{name} ({reason[:160]}). What was generated is kept: start again "
        f"where "
        "it does, or without --hub_metrics.") from error
  return metric.to("cuda" if torch.cuda.is_available() else "cpu")


def _update(metric, images: Images, **kwargs) -> None:
  for start in range(0, len(images), _BATCH):
    part = _tensor(images[start:start + _BATCH], metric.device)
    metric.update(part, **kwargs)


def _tensor(images_NHWC: np.ndarray, device):
  """uint8 [N, 3, H, W] of torch."""
  channels_first = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
  return need("torch", _EXTRA).from_numpy(channels_first).to(device)
