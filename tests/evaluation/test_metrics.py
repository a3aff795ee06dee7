"""What the metrics promise: right numbers, honest errors, no surprises."""

import io

import chex
import jax
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.evaluation import efficientnet, metrics


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


def test_frechet_distance_of_one_feature(rng):
  """In one dimension it is (difference of means)^2 + (of deviations)^2."""
  a, b = rng.normal(2, 3, (50, 1)), rng.normal(0, 1, (20, 1))
  want = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
  assert metrics.frechet_distance(a, b) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("count", [5, 40])
def test_frechet_distance_matches_the_matrix_root(rng, count):
  """The shortcut equals the textbook formula, images few or many."""
  a = rng.normal(size=(count, 12)) @ rng.normal(size=(12, 12))
  b = rng.normal(1, 2, (30, 12))
  values, vectors = np.linalg.eigh(np.cov(b.T))
  root = vectors * np.sqrt(values) @ vectors.T
  cross = np.linalg.eigvalsh(root @ np.cov(a.T) @ root).clip(0)
  want = np.square(a.mean(0) - b.mean(0)).sum() - 2 * np.sqrt(cross).sum()
  want += np.trace(np.cov(a.T) + np.cov(b.T))
  assert metrics.frechet_distance(a, b) == pytest.approx(want, rel=1e-6)
  assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "distance", [metrics.frechet_distance, metrics.kernel_distance]
)
def test_distances_need_two_images(distance):
  """One image has no spread: the user is reported, no NaN comes out."""
  with pytest.raises(UserError, match="got images=1"):
    distance(np.ones((1, 4)), np.ones((5, 4)))


def test_kernel_distance_matches_its_definition(rng):
  """The estimate is the sum over pairs of different images."""
  a, b = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))

  def mean(x, y, skip):
    return np.mean([
        (p @ q / 3 + 1) ** 3
        for i, p in enumerate(x)
        for j, q in enumerate(y)
        if not (skip and i == j)
    ])

  want = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
  assert metrics.kernel_distance(a, b).value == pytest.approx(want)
  assert metrics.kernel_distance(a[:3], b).error is None


def test_images_of_one_prompt_are_not_compared(rng):
  """Generates of one distribution per prompt lie at distance 0, however unlike
  prompts."""
  prompts = np.repeat(np.arange(20), 2)
  values, naive = [], []
  for _ in range(30):
    middle = 2 * rng.normal(size=(20, 12))[prompts]
    a, b = middle + rng.normal(size=(2, 40, 12))
    values.append(metrics.kernel_distance(a, b, names=(prompts, prompts)).value)
    naive.append(metrics.kernel_distance(a, b).value)
  error = np.std(values) / np.sqrt(len(values))
  assert abs(np.mean(values)) < 3 * error < 0.5
  assert np.mean(naive) < -1


def test_kernel_distance_error_is_honest(rng):
  """Between equal distributions it scatters around zero as its error says."""
  got = [
      metrics.kernel_distance(*rng.normal(size=(2, 40, 6))) for _ in range(100)
  ]
  values, errors = np.array(got).T
  assert abs(values.mean()) < 4 * values.std() / 10
  assert 0.7 < errors.mean() / values.std() < 1.8
  shifted = metrics.kernel_distance(
      rng.normal(size=(40, 6)), rng.normal(1, 1, (40, 6))
  )
  assert shifted.value > 3 * shifted.error


def test_retrieval_ranks():
  """Rank 1 is the nearest by angle; copies share it; zeros are no NaN."""
  gallery = np.array([[1, 0], [0, 1], [1, 1], [2, 2.0]])
  queries = np.array([[9, 0], [0, 1], [3, 3], [1, 0], [0, 0]], np.float32)
  ranks = metrics.retrieval_ranks(queries, gallery, np.array([0, 0, 3, 1, 2]))
  np.testing.assert_array_equal(ranks, [1, 4, 1, 4, 1])
  assert metrics.recall_at(ranks, 1) == pytest.approx(0.6)
  assert metrics.recall_at(ranks, 10) == 1.0


@pytest.fixture(name="computed")
def _computed(monkeypatch):
  """A tiny gallery, and the list of what had to be computed."""
  calls = []

  def image_features(images):
    calls.append(images)
    return images.astype(np.float32)

  monkeypatch.setattr(metrics, "emoji_images", lambda: np.eye(3, dtype="u1"))
  monkeypatch.setattr(metrics.efficientnet, "image_features", image_features)
  return calls


def test_gallery_is_computed_once(computed, tmp_path):
  """A second call reads the cache; a damaged cache is computed anew."""
  first = metrics.emoji_gallery(cache_dir=tmp_path / "cache")
  np.testing.assert_array_equal(
      metrics.emoji_gallery(cache_dir=tmp_path / "cache"), first
  )
  assert len(computed) == 1
  (path,) = (tmp_path / "cache").iterdir()
  whole = path.read_bytes()
  for damaged in (b"", whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1])):
    path.write_bytes(damaged)
    metrics.emoji_gallery(cache_dir=tmp_path / "cache")
    assert path.read_bytes() == whole
  assert len(computed) == 4


def test_gallery_needs_no_cache(computed, tmp_path):
  """Where nothing can be written the gallery still comes out."""
  (tmp_path / "file").write_bytes(b"")
  gallery = metrics.emoji_gallery(cache_dir=tmp_path / "file" / "cache")
  assert gallery.shape == (3, 3)


def test_gallery_key_follows_weights_and_data(monkeypatch, tmp_path):
  """Other images, captions or features never meet an old cache."""
  keys = {metrics._gallery_key()}
  monkeypatch.setattr(efficientnet, "VERSION", -1)
  keys.add(metrics._gallery_key())
  monkeypatch.setattr(metrics.sources, "EMOJI_DIR", tmp_path)
  for images, captions in (("a", "b"), ("ab", "")):
    (tmp_path / "images.zip").write_text(images)
    (tmp_path / "captions.json").write_text(captions)
    keys.add(metrics._gallery_key())
  assert len(keys) == 4


def test_cached_array_is_no_pickle(tmp_path):
  """The cache cannot run code even with a right checksum."""
  buffer = io.BytesIO()
  np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
  digest = metrics.hashlib.sha256(buffer.getvalue()).digest()
  (tmp_path / "x").write_bytes(digest + buffer.getvalue())
  with pytest.raises(ValueError, match="allow_pickle"):
    metrics._read_array(tmp_path / "x")


def test_likelihood_gap_is_paired(rng):
  """What prompts have in common cancels; the seed fixes the interval."""
  ar = rng.normal(5, 3, 40)
  decoder = ar + 0.5 + 0.1 * rng.normal(size=40)
  gap = metrics.likelihood_gap(decoder, ar, seed=1, resamples=500)
  low, high = gap.interval
  assert low < gap.value < high and high - low < 0.1
  assert gap == metrics.likelihood_gap(decoder, ar, seed=1, resamples=500)
  assert metrics.likelihood_gap(decoder[:1], ar[:1], seed=1).interval is None


def test_likelihood_gap_interval_covers(rng):
  """The 95% interval holds the truth about that often."""
  hits = 0
  for seed in range(200):
    low, high = metrics.likelihood_gap(
        rng.normal(0.3, 1, 50), rng.normal(0, 1, 50), seed, resamples=200
    ).interval
    hits += low < 0.3 < high
  assert 175 <= hits <= 199


def test_excess_of_an_exact_sampler_is_zero(rng):
  """Tokens sampled from the distribution itself show no excess."""
  logits = rng.normal(size=(30, 64, 5))
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  entropy = -(np.exp(log_p) * log_p).sum(-1)
  drawn = (logits + rng.gumbel(size=logits.shape)).argmax(-1)

  def nll(ids):
    return -np.take_along_axis(log_p, ids[..., None], -1)[..., 0]

  exact = metrics.excess(nll(drawn), entropy)
  assert abs(exact.value) < 4 * exact.error < 0.2
  greedy = metrics.excess(nll(logits.argmax(-1)), entropy)
  assert greedy.value < -4 * greedy.error
  assert metrics.excess(nll(drawn)[:1], entropy[:1]).error is None


def test_likelihoods_of_other_shapes_are_refused():
  """Arrays that do not match are an error, never broadcast."""
  with pytest.raises(AssertionError):
    metrics.likelihood_gap(np.zeros(3), np.zeros((3, 3)), seed=0)
  with pytest.raises(AssertionError):
    metrics.excess(np.zeros((3, 4)), np.zeros(4))
