"""Published families: sizes, tables, prompts; no weights needed."""

import functools
import math

import jax
import numpy as np
import pytest

from ssd_jax.cli.convert import RECIPES
from ssd_jax.config import UserError
from ssd_jax.families import anole, emu3, janus, llamagen, lumina, published
from ssd_jax.names import copy

_CONFIGS = {
    **{f"llamagen:{v}": (llamagen, v) for v in llamagen.VARIANTS},
    **{f"lumina:{v}": (lumina, v) for v in lumina.VARIANTS},
    **{f"anole:{v}": (anole, v) for v in anole.VARIANTS},
    **{f"janus:{v}": (janus, v) for v in janus.VARIANTS},
    "emu3:1:1": (emu3, "1:1"), "emu3:16:9": (emu3, "16:9"),
}


@functools.cache
def recipe_of(name):
  family, variant = _CONFIGS[name]
  config = family.get_config(variant)
  return RECIPES[config.family](config)


@pytest.mark.parametrize("name", _CONFIGS)
def test_tables_fill_every_array(name):
  """At full size, each of our arrays is filled once and entirely."""
  for part in recipe_of(name).parts:
    rows = {}
    for row in part.table.rows:
      rows.setdefault(row.target, []).append(row)
    assert set(rows) == set(part.leaves)
    for target, mine in rows.items():
      shape = part.leaves[target].shape
      layers = [row.layer for row in mine]
      if layers[0] is not None:
        assert layers == list(range(shape[0])), target
        continue
      at = 0
      for row in mine:
        assert row.at == at, target
        at += row.sources[0].shape[0]
      if mine[0].convert is copy or len(mine) > 1:
        assert at == shape[0], target


@pytest.mark.parametrize("name", _CONFIGS)
def test_tables_convert_to_our_shapes(name):
  """At full size, the published shapes turn into ours."""
  for part in recipe_of(name).parts:
    for row in part.table.rows:
      if row.layer not in (None, 0) or math.prod(
          part.leaves[row.target].shape) > 2**31 or len(row.sources) > 1:
        continue
      arrays = []
      for source in row.sources:
        shape = source.shape
        if source.rows:
          shape = (source.rows[1] - source.rows[0], *shape[1:])
        arrays.append(np.broadcast_to(np.int8(0), shape))
      shape = part.leaves[row.target].shape
      if row.layer is not None:
        shape = shape[1:]
      got = row.convert(*arrays).shape
      assert got[1:] == shape[1:] and (got == shape or row.convert is copy)


def published_size(part):
  """(tensors, parameters) as published."""
  shapes = {s.name: s.shape for row in part.table.rows for s in row.sources}
  return len(shapes), sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("name, part, tensors, parameters", [
    ("llamagen:c2i_B_256", 0, None, 110.9e6),
    ("llamagen:t2i_XL_256", 0, 258, 777.9e6),
    ("lumina:768", 0, None, None),
    ("emu3:1:1", 0, None, 8.49e9),
    ("llamagen:c2i_B_256", 1, 343, 71.9e6),
    ("lumina:768", 1, 293, 68.7e6),
    ("emu3:1:1", 1, 495 - 8, 270.7e6),
])
def test_published_sizes(name, part, tensors, parameters):
  """Numbers of tensors and parameters are the published ones."""
  count, size = published_size(recipe_of(name).parts[part])
  if name == "lumina:768" and part == 0:
    assert size == 7_013_158_912
    return
  assert tensors in (None, count)
  assert size == pytest.approx(parameters, rel=1e-3)


def test_lumina_sizes():
  """The crop lists have the published lengths; others are refused."""
  assert [len(lumina.sizes(t)) for t in (512, 768, 1024)] == [49, 73, 97]
  assert lumina.parse_size("768x768", 768) == (768, 768)
  with pytest.raises(UserError, match="got size '700x700'"):
    lumina.parse_size("700x700", 768)


def test_emu3_ratios():
  """Ratios give the published grids; others are refused."""
  assert emu3.cells("1:1", 720 * 720, 8) == (90, 90)
  assert emu3.cells("16:9", 720 * 720, 8) == (68, 120)
  for ratio in ("wide", "0:1", "100:1", "1"):
    with pytest.raises(UserError, match="got ratio"):
      emu3.cells(ratio, 720 * 720, 8)


@pytest.mark.parametrize("family", [llamagen, lumina, anole, janus, emu3])
def test_unknown_variants_are_named(family):
  """A wrong variant is an error of one line."""
  with pytest.raises(ValueError, match="got .*'tiny'") as error:
    family.get_config("tiny")
  assert "\n" not in str(error.value)


def spelled(family):
  """The family with letters for a tokenizer."""
  family.__dict__["text_ids"] = lambda text: [ord(c) for c in text]
  return family


def test_lumina_prompt():
  """Instruction, turn, then the opening; unconditionally the opening alone."""
  config = lumina.get_config("768")
  config.size = "768x736"
  family = spelled(lumina.Lumina(config))
  assert (family.grid.rows, family.grid.cols) == (46, 48)
  prompt, notes = family.encode_prompts(["a cat"], guided=True)
  words = "Generate an image of 768x736 according to the following prompt:\n"
  opening = [8197, 8804 + 23, 8804 + 24]
  expected = [0, *map(ord, words + "a cat"), 8710, *opening]
  cond, uncond = (np.asarray(t)[np.asarray(m)].tolist()
                  for t, m in zip(prompt.tokens, prompt.mask))
  assert (cond, uncond, notes) == (expected, opening, [])
  first = prompt.tokens.shape[1] - 3
  assert prompt.positions[1, first:first + 5].tolist() == [0, 1, 2, 3, 4]
  assert family.input_ids[[0, -2, -1]].tolist() == [4, 8195, 8803]


def test_emu3_prompt():
  """Text and negative prompt, each before the size in digits."""
  config = emu3.get_config("16:9")
  config.negative = "bad"
  family = spelled(emu3.Emu3(config))
  header = [151852, *map(ord, "68*120"), 151851]
  cond, uncond = family.streams("cat")
  assert list(cond) == [151849, *map(ord, "cat" + config.suffix), *header]
  assert list(uncond) == [151849, *map(ord, "bad"), *header]


def test_long_prompts_are_refused():
  """A prompt beyond the largest bucket is an error of one line."""
  with pytest.raises(UserError, match="got a prompt of 5000 tokens"):
    published.left_padded([[1] * 5000], 4)


def test_llamagen_classes():
  """Classes are rows of the table; the null class guides; others fail."""
  family = llamagen.LlamaGen(llamagen.get_config("c2i_B_256"))
  prompt, _ = family.encode_prompts(["207", 0], guided=True)
  assert prompt.tokens.ravel().tolist() == [207, 0, 1000, 1000]
  assert prompt.positions.shape == (4, 257)
  assert not family.rope[0].any() and family.rope[1].any()
  assert family.input_ids[0] == 1001
  for bad in ("1000", "-1", "cat"):
    with pytest.raises(UserError, match="got class"):
      family.encode_prompts([bad], guided=False)


def test_llamagen_features_end_at_the_last_slot():
  """Captions are moved to the end; hidden slots stay hidden in both rows."""
  family = llamagen.LlamaGen(llamagen.get_config("t2i_XL_256"))
  features = np.ones((1, 120, 2048), np.float32)
  mask = np.arange(120)[None] < 3
  prompt = family.from_features(features, mask, guided=True)
  assert np.flatnonzero(prompt.mask[0]).tolist() == [117, 118, 119]
  assert np.array_equal(prompt.mask[0], prompt.mask[1])
  assert prompt.tokens[1].tolist() == list(range(1, 121))
  assert float(prompt.features[0].sum()) == 3 * 2048


def test_full_size_parameters_have_our_shapes():
  """A trunk of 7 billion parameters is described without being made."""
  family = lumina.Lumina(lumina.get_config())
  shapes = jax.eval_shape(family.generator.init, jax.random.key(0))["trunk"]
  assert shapes["layers"]["attn"]["q_norm"]["scale"].shape == (32, 32, 128)
  assert shapes["head"].shape == (4096, 8192)
