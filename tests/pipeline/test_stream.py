"""Continuous refill: images one by one, the same as those of a whole call."""

import itertools

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.ar import AR
from ssd_jax.pipeline import model_folder, stream as stream_lib, testing
from tests.support.toy_families import CONFIGS

PROMPTS = ["a", "longer", "b", "wor", "c"]


def assert_same(pictures, output):
  """Each image of a stream is the one of its index."""
  pictures = sorted(pictures, key=lambda picture: picture.index)
  assert [p.index for p in pictures] == list(range(len(output.tokens)))
  assert [p.prompt for p in pictures] == list(output.prompts)
  assert [p.passes for p in pictures] == list(output.passes)
  for name, of_all in (("tokens", output.tokens), ("image", output.images),
                       ("commit_pass", output.commit_pass)):
    np.testing.assert_array_equal([getattr(p, name) for p in pictures], of_all)


@pytest.mark.quick(1)
@pytest.mark.parametrize("decoder, end_of_row", [
    ("ar", True), ("stair", False)])
def test_stream_generates_what_generate_does(decoder, end_of_row):
  """Slots are reused, and no image depends on what was there before."""
  pipe = testing.tiny(
      vocab=5, rows=2, cols=4, end_of_row=end_of_row, guidance=2.0)
  whole = pipe.generate(PROMPTS, decoder, batch=5, seed=3)
  stream = pipe.stream(PROMPTS, decoder, batch=2, seed=3)
  assert_same(stream, whole)
  assert whole.passes.max() <= stream.passes < whole.passes.sum()


@pytest.fixture(scope="module")
def pipe():
  return testing.tiny(vocab=5, rows=2, cols=2, guidance=2.0)


@pytest.mark.slow
def test_one_compile_of_each_and_prompts_as_there_is_room(pipe):
  """Other prompts, seeds and scales compile nothing; prompts may not end."""
  read, first = [], pipe.stream(PROMPTS, batch=2)
  assert len(list(first)) == 5 and first.clock.compiling > 0
  programs = len(pipe.programs)

  def endless():
    for i in itertools.count():
      read.append(i)
      yield f"p{i}"

  stream = pipe.stream(endless(), num_images=2, batch=2, seed=7, guidance=3.0)
  found = [next(stream) for _ in range(5)]
  assert len(pipe.programs) == programs and max(read) <= 4
  whole = pipe.generate(
      ["p0", "p1"], num_images=2, batch=4, seed=7, guidance=3.0)
  assert_same([p for p in found if p.index < 4], whole)
  picked = pipe.stream(
      ["p1", "p0"], batch=2, seed=7, guidance=3.0, first_image=[2, 0])
  for picture in picked:
    np.testing.assert_array_equal(picture.tokens, whole.tokens[picture.index])


@pytest.mark.slow
def test_prompts_of_any_length_share_a_batch():
  """A longer prompt widens what all have; the others' images stay."""
  config = CONFIGS["lumina"]()
  config.size = "64x64"
  pipe = model_folder.from_config(config)
  trunk = pipe.params["trunk"]
  pipe = pipe.with_params(
      trunk={**trunk, "embedding": 30.0 * trunk["embedding"]})
  texts = ["a", "b" * 40, "c", "d" * 30]
  stream = pipe.stream(texts, batch=2, temperature=0.5)
  for picture in stream:
    alone = pipe.generate(
        [picture.prompt], temperature=0.5, first_image=picture.index)
    np.testing.assert_array_equal(picture.tokens, alone.tokens[0])


@pytest.mark.slow
def test_on_step_is_called_every_few_passes(pipe, monkeypatch):
  """Steps sum up to the images, many an image, and change none."""
  monkeypatch.setattr(stream_lib, "_PASSES", 1)
  steps = []
  stream = pipe.stream(PROMPTS, batch=2, seed=3, on_step=steps.append)
  assert_same(stream, pipe.generate(PROMPTS, batch=4, seed=3))
  assert sum(steps) == pytest.approx(len(PROMPTS))
  assert len(steps) == stream.passes > len(PROMPTS) and min(steps) > 0


@pytest.mark.parametrize("wrong", [
    dict(prompts=[]), dict(num_images=0), dict(batch=0), dict(seed=-1),
    dict(first_image=[1, 2]), dict(top_p=2.0), dict(prompts="a heart"),
    dict(decoder=AR), dict(decoder="no")])
def test_mistakes_are_raised_before_anything_is_generated(pipe, wrong):
  """What a user gets wrong ends the call, not the first image."""
  with pytest.raises(UserError, match="Expected .*got"):
    pipe.stream(**{"prompts": ["a"], **wrong})
