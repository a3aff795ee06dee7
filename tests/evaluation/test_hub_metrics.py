"""FID, IS and CLIPScore by torchmetrics: fed every image, errors in a line."""

import types

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.evaluation import hub_metrics


def pictures(count, first=0):
  """`count` images of one grey each."""
  return [np.full((8, 8, 3), first + i, np.uint8) for i in range(count)]


def test_hub_metrics_get_every_image(monkeypatch):
  """FID sees both sets as uint8 [N, 3, H, W], CLIPScore each prompt once."""
  made = {}

  class Metric:

    def __init__(self, *args):
      made[type(self).__name__] = self
      self.seen, self.device = [], None

    def to(self, device):
      self.device = device
      return self

    def update(self, images, *texts, **kwargs):
      assert images.dtype == np.uint8 and images.shape[1:] == (3, 8, 8)
      self.seen.append((len(images), kwargs.get("real"), *texts))

  class FrechetInceptionDistance(Metric):

    def compute(self):
      return 1.0

  class InceptionScore(Metric):

    def compute(self):
      return 2.0, 0.1

  class CLIPScore(Metric):

    def compute(self):
      return 3.0

  class Tensor(np.ndarray):

    def to(self, device):
      assert device == "cpu"
      return self

  modules = {
      "torch": types.SimpleNamespace(
          cuda=types.SimpleNamespace(is_available=lambda: False),
          from_numpy=lambda x: x.view(Tensor)),
      "torchmetrics.image.fid": types.SimpleNamespace(
          FrechetInceptionDistance=FrechetInceptionDistance),
      "torchmetrics.image.inception": types.SimpleNamespace(
          InceptionScore=InceptionScore),
      "torchmetrics.multimodal.clip_score": types.SimpleNamespace(
          CLIPScore=CLIPScore),
  }
  monkeypatch.setattr(hub_metrics, "need", lambda name, extra: modules[name])
  texts = [f"prompt {i}" for i in range(20)]
  images = np.stack(pictures(20))
  got = hub_metrics.compute(images, texts, images[:3])
  assert got == hub_metrics.HubFigures(1.0, 3.0, 2.0)
  fid = made["FrechetInceptionDistance"].seen
  assert sum(n for n, real in fid if real) == 3
  assert sum(n for n, real in fid if not real) == 20
  assert sum((x[2] for x in made["CLIPScore"].seen), []) == texts
  assert hub_metrics.compute(images, texts, None).fid is None


def test_missing_extra_is_one_line(monkeypatch):
  """Without torchmetrics the user reads which extra to install."""
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  with pytest.raises(UserError, match=r"ssd-jax\[metrics\]"):
    hub_metrics.check_installed()


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
  """A download that fails says so, and that what was generated is kept."""
  def fail(*args):
    raise OSError("no route\nto host")

  modules = types.SimpleNamespace(CLIPScore=fail)
  monkeypatch.setattr(hub_metrics, "need", lambda name, extra: modules)
  with pytest.raises(UserError, match="no route.*kept") as error:
    hub_metrics.compute(np.stack(pictures(2)), ["a", "b"], None)
  assert "\n" not in str(error.value)
