"""Painting GLM-Image's tokens with diffusers' own pipeline, at toy size."""

import functools
import json

from absl import flags
import diffusers
import numpy as np
from PIL import Image
import pytest
import torch
import transformers

import ssd_jax
from ssd_jax.cli import common, generate, run
from ssd_jax.core.config import UserError
from ssd_jax.pipeline import model_folder, painting
from tests.support.toy_families import glm_image_config
from tests.support.toy_weights import CODES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A saved pipeline without its autoregressive stage."""
  torch.manual_seed(0)
  text_encoder = transformers.T5EncoderModel(transformers.T5Config(
      vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
  vae = diffusers.AutoencoderKL(
      block_out_channels=[4, 4, 4, 4], layers_per_block=1, latent_channels=4,
      down_block_types=["DownEncoderBlock2D"] * 4, norm_num_groups=4,
      up_block_types=["UpDecoderBlock2D"] * 4, sample_size=64,
      latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
  transformer = diffusers.GlmImageTransformer2DModel(
      patch_size=2, in_channels=4, out_channels=4, num_layers=1,
      attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
      time_embed_dim=16, condition_dim=8,
      prior_vq_quantizer_codebook_size=CODES)
  painter = diffusers.GlmImagePipeline(
      tokenizer=transformers.ByT5Tokenizer(), processor=None,
      text_encoder=text_encoder, vision_language_encoder=None, vae=vae,
      transformer=transformer,
      scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
  where = tmp_path_factory.mktemp("painter")
  painter.save_pretrained(where)
  return where


@functools.cache
def generated():
  """Tokens of two images of 96 x 64 px."""
  pipe = model_folder.from_config(glm_image_config())
  return pipe.generate(["a fox", 'a sign "yes"'], "ar", seed=1)


def test_tokens_become_images(folder):
  """The pipeline reads what we upsampled, and paints every image alike however
  many there are; other tokens give another image."""
  out, painter = generated(), painting.load(folder)
  assert painter.vision_language_encoder is None
  seen = []
  painter.transformer.register_forward_pre_hook(
      lambda _, args, kwargs: seen.append(kwargs["prior_token_id"]),
      with_kwargs=True)
  settings = dict(num_inference_steps=2, guidance_scale=1.5)
  images = ssd_jax.paint(out, painter, seed=3, **settings)
  assert images.shape == (2, 64, 96, 3) and images.dtype == np.uint8
  theirs = painter._upsample_token_ids(
      torch.from_numpy(out.tokens[0].copy()), 2, 3)
  assert torch.equal(seen[0], theirs)
  again = painting.paint_grid(
      painter, out.prompts[1], out.tokens[1], 3, 1, **settings)
  np.testing.assert_array_equal(again, images[1])
  other = painting.paint_grid(
      painter, out.prompts[1], out.tokens[0], 3, 1, **settings)
  assert (other != images[1]).any()


def test_the_command_paints(folder, monkeypatch, capsys, tmp_path):
  """--painter writes a PNG beside the tokens; other models refuse it."""
  pipe = model_folder.from_config(glm_image_config())
  monkeypatch.setattr(common, "load_pipeline", lambda **_: pipe)
  monkeypatch.setattr(run, "use_compilation_cache", lambda: None)
  monkeypatch.setattr(painting, "paint_grid", functools.partial(
      painting.paint_grid, num_inference_steps=2))
  if "config" not in flags.FLAGS:
    run.define_config()
  flags.FLAGS.unparse_flags()
  command = ["generate", "--prompt", "a fox", "--decoder", "ar", "--json",
             "--painter", str(folder), "--out", str(tmp_path)]
  run.main(generate.body, command)
  said = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert said["images"] == [str(tmp_path / "0000_a_fox.npy")]
  assert said["painted"] == [str(tmp_path / "0000_a_fox.png")]
  with Image.open(said["painted"][0]) as image:
    assert image.size == (96, 64) and image.text["prompt"] == "a fox"
  pipe = ssd_jax.testing.tiny(vocab=2, heads=(0, 0))
  with pytest.raises(SystemExit):
    run.main(generate.body, command)
  assert "got painter" in capsys.readouterr().err


def test_what_paints_nothing_is_one_line(folder, tmp_path):
  """Another pipeline, no pipeline, images that are there already."""
  (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
  for name in (tmp_path, folder / "vae", "no/such/name", "..."):
    with pytest.raises(UserError, match="^Expected .*GlmImagePipeline"):
      painting.load(name)
  (folder / "vae" / "config.json").rename(folder / "vae" / "gone.json")
  with pytest.raises(UserError, match="^Expected .*GlmImagePipeline"):
    painting.load(folder)
  pipe = ssd_jax.testing.tiny(vocab=2, heads=(0, 0))
  with pytest.raises(UserError, match="another model paints"):
    ssd_jax.paint(pipe.generate(["a"]), folder)
