"""Images in prompts: what is read, what is generated after them."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import ssd_jax
from ssd_jax.core.config import UserError
from ssd_jax.decoding import sampling
from ssd_jax.pipeline import model_folder
from ssd_jax.pipeline.pipeline import Pipeline
from tests.support.toy_families import CONFIGS

_BLUE = Image.new("RGB", (30, 20), "blue")


@pytest.fixture(scope="module")
def pipe():
  config = CONFIGS["emu3_5"]()
  family = model_folder.FAMILIES["emu3_5"]({"config": config.to_dict()}, None)
  params, vq = jax.jit(lambda key: (
      family.generator.init(key),
      family.vq.init(key, jnp.zeros((1, 2, 2, 3)))["params"]))(
          jax.random.key(0))
  return Pipeline(family, params, vq, family.generator.model())


def test_an_image_is_generated_after_those_of_its_prompt(pipe):
  """Greedy tokens are the likeliest after the prompt with the images' codes;
  images and arrays are the same to it, and so is a stream."""
  noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  args = dict(decoder="ar", temperature=0.0, guidance=2.0)
  out = pipe.generate(["ab"], images=[noise, _BLUE], **args)
  again = pipe.generate(["ab"], images=[Image.fromarray(noise), _BLUE], **args)
  np.testing.assert_array_equal(out.tokens, again.tokens)
  [streamed] = pipe.stream(["ab"], images=[noise, _BLUE], **args)
  np.testing.assert_array_equal(out.tokens[0], streamed.tokens)
  vq = lambda x, method: pipe.family.vq.apply(
      {"params": pipe.vq_params}, x, method=method)
  codes = jax.jit(lambda x: vq(vq(x / 127.5 - 1, "encode"), "quantize"))
  grids = [np.asarray(codes(np.asarray(
      picture.resize((12, 8), Image.Resampling.BICUBIC), np.float32)[None]))[0]
           for picture in (Image.fromarray(noise), _BLUE)]
  assert grids[0].shape == (4, 6) and (grids[0] != grids[1]).any()
  prompt, _ = pipe.family.image_prompts().encode_prompts(["ab"], True, grids)
  logits = pipe.programs.stream_logits(
      pipe.params, prompt, pipe.sequence(out.tokens))
  settings, _ = pipe.sampling(temperature=0.0, guidance=2.0)
  p_NV = sampling.target(logits, settings)[0]
  slots = pipe.model.grid.slot_of.ravel()
  np.testing.assert_array_equal(
      np.argmax(p_NV, -1)[slots], out.tokens.ravel())


def test_the_output_has_the_size_of_a_single_image():
  """Unless it is said otherwise, or there are several."""
  config = CONFIGS["emu3_5"]()
  made = lambda images, fixed=(): model_folder.for_images(
      config, images, fixed).ratio
  assert made([_BLUE]) == "4x6" and config.ratio == "2x3"
  assert made([_BLUE], ("ratio",)) == made([_BLUE, _BLUE]) == made([]) == "2x3"


@pytest.mark.parametrize("images, said", [
    ([_BLUE] * 4, "Expected at most 3 images in a prompt of emu3_5, got 4"),
    ([Image.new("RGB", (90, 10))], "got an image of 90x10 pixels"),
    (["no.png"], "got the file no.png"), ("no.png", "got str as images"),
    (np.zeros((1, 8, 8, 3), np.uint8), "got ndarray as images"),
    ([np.zeros((8, 8, 3))], "got an image of shape"),
])
def test_images_that_are_not_read_are_one_line(pipe, images, said):
  """Too many, too long, missing, not in a list, of another kind."""
  with pytest.raises(UserError, match=said) as error:
    pipe.generate(["ab"], images=images)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["emoji", "anole", "glm-image"])
def test_families_of_text_refuse_images_before_they_are_loaded(name):
  """Nothing is downloaded; --complete is named where the family has pixels."""
  with pytest.raises(UserError, match="Expected prompts of text") as error:
    ssd_jax.load(name, images=[_BLUE])
  assert ("--complete" in str(error.value)) == (name != "glm-image")
