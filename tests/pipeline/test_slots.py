"""A batch whose images come and go: each is what it would be alone."""

import numpy as np
import pytest

from ssd_jax.decoding import registry
from ssd_jax.pipeline import testing
from ssd_jax.pipeline.run import Run
from ssd_jax.pipeline.slots import Item, Slots

SETTINGS = (dict(), dict(guidance=5.0, top_k=2), dict(temperature=0.3),
            dict(top_p=0.6, guidance=1.5))


@pytest.fixture(scope="module")
def pipe():
  return testing.tiny(vocab=5, rows=3, cols=4, guidance=2.0)


def item(pipe, number, **sampling):
  """Image 0 of the call with this number as seed."""
  settings, guided = pipe.sampling(**sampling)
  prompt, _ = pipe.family.encode_prompts([f"text {number}"], guided)
  return Item(number, 0, number, prompt,
              settings.with_filters())


def drain(slots):
  """Tokens by name of all images in the slots."""
  found = {}
  while slots.start(3):
    found |= {x.name: x.tokens for x in slots.finish()}
  return found


def alone(pipe, decoder, number, **sampling):
  return pipe.generate(
      [f"text {number}"], decoder, seed=number, batch=1, **sampling).tokens[0]


@pytest.mark.slow
def test_each_image_has_settings_of_its_own(pipe):
  """Seed, guidance, temperature, top-k and top-p differ within a batch, whose
  one program serves all; every image is the one that `generate` makes."""
  decoder = "sjd:window=3"
  slots = Slots(Run(pipe.programs, registry.parse(decoder)), len(SETTINGS))
  for number, sampling in enumerate(SETTINGS):
    slots.insert(number, item(pipe, number, **sampling))
  programs = len(pipe.programs)
  found = drain(slots)
  slots.insert(slots.free()[0], item(pipe, 9, **SETTINGS[1]))
  found |= drain(slots)
  assert len(pipe.programs) - programs <= 2  # passes, and pixels
  for number, sampling in [*enumerate(SETTINGS), (9, SETTINGS[1])]:
    np.testing.assert_array_equal(
        found[number], alone(pipe, decoder, number, **sampling))


def test_an_evicted_image_leaves_the_others_alone(pipe):
  """Its slot is free at once, and holds the next image."""
  slots = Slots(Run(pipe.programs, registry.parse("ar")), 2)
  for number in range(2):
    slots.insert(number, item(pipe, number))
  slots.start(3)
  assert not slots.finish() and slots.free() == []
  assert [x[0] for x in slots.in_progress()] == [0, 1]
  slots.evict(0)
  assert slots.free() == [0]
  with pytest.raises(ValueError, match="slot 0"):
    slots.evict(0)
  slots.insert(0, item(pipe, 5))
  # An image that has no pass yet shows nothing of the one before it.
  assert [x[0] for x in slots.in_progress()] == [1]
  found = drain(slots)
  assert sorted(found) == [1, 5]
  for number, tokens in found.items():
    np.testing.assert_array_equal(tokens, alone(pipe, "ar", number))
