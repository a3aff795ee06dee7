"""What is promised of the model that comes with the package."""

import shutil

import numpy as np
import pytest

import ssd_jax
from ssd_jax.core.config import UserError
from ssd_jax.data import sources
from ssd_jax.decoding.ar import AR
from ssd_jax.evaluation import efficientnet, metrics, quality
from ssd_jax.pipeline.model_folder import EMBEDDED
from ssd_jax.storage import checkpoints
from ssd_jax.training.tokenizer import psnr, reconstruct


@pytest.fixture(scope="module")
def pipe():
  return ssd_jax.load("emoji")


def test_weights_are_small():
  """All parts together stay under 40 MB."""
  files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
  assert 20e6 < sum(path.stat().st_size for path in files) < 40e6


@pytest.mark.parametrize("change, match", [
    (lambda x: x[::-1],
     "tokenizer that the trunk was trained with, got .* changed"),
    (lambda x: x[:512], r"codebook of shape \(512, 16\)"),
])
def test_another_tokenizer_is_found(tmp_path, change, match):
  """A trunk loads only beside the tokenizer whose codes it learned."""
  folder = tmp_path / "model"
  shutil.copytree(EMBEDDED, folder)
  vq = checkpoints.restore(folder / "vq")
  checkpoints.save(folder / "vq", {**vq, "codebook": change(vq["codebook"])})
  with pytest.raises(UserError, match=match):
    ssd_jax.load(folder)


@pytest.mark.slow
def test_held_out_pictures_keep_their_features(pipe):
  """The tokenizer shows emoji it never saw at 26 dB, with all of its codes."""
  held = sources.EmojiSource("validation")
  images = np.stack([held[i]["image"] for i in range(len(held))])
  drawn, codes = reconstruct(pipe.family.vq, pipe.vq_params, images)
  assert psnr(drawn, images).mean() > 26
  assert len(np.unique(codes)) > 0.95 * 1024


@pytest.mark.slow
@pytest.mark.as_users_compile
def test_an_image_does_not_depend_on_its_batch(pipe):
  """The same tokens alone and in company."""
  prompts = ["red heart", "flag: Kenya"]
  one, two = (pipe.generate(prompts, "exact", batch=b) for b in (1, 2))
  np.testing.assert_array_equal(one.tokens, two.tokens)
  np.testing.assert_array_equal(one.passes, two.passes)


@pytest.mark.slow
@pytest.mark.as_users_compile
def test_images_match_their_prompts(pipe):
  """Of training captions most find their emoji among its ten nearest."""
  prompts = quality.emoji_captions("train")[:16]
  drawn = pipe.generate(prompts, AR(), batch=16)
  ranks = metrics.retrieval_ranks(
      efficientnet.image_features(drawn.images), metrics.emoji_gallery(),
      quality.emoji_targets(prompts))
  assert metrics.recall_at(ranks, 10) >= 0.5
