"""Published families: sizes, tables, prompts; no weights needed."""

import dataclasses
import pathlib
import types

import jax
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.prompts import clean
from ssd_jax.families import (
  anole,
  captions,
  emu3,
  emu3_5,
  janus,
  liquid,
  llamagen,
  lumina,
  lumina2,
  published,
  simplear,
)
from ssd_jax.pipeline import model_folder
from tests.support.toy_families import CONFIGS

_CONFIGS = {
    **{f"llamagen:{v}": (llamagen, v)
       for v in (*llamagen.VARIANTS, "c2i_B_256_ds8")},
    **{f"lumina:{v}": (lumina, v) for v in lumina.VARIANTS},
    **{f"anole:{v}": (anole, v) for v in anole.VARIANTS},
    **{f"janus:{v}": (janus, v) for v in janus.VARIANTS},
    "emu3:1:1": (emu3, "1:1"), "emu3:16:9": (emu3, "16:9"),
    "emu3_5:4:3": (emu3_5, "4:3"), "liquid": (liquid, ""),
    "lumina2": (lumina2, ""), "simplear": (simplear, ""),
}


@pytest.mark.parametrize("name, guidance, temperature, top_k, top_p", [
    ("llamagen:c2i_XL_384", 4.0, 1.0, 2000, 1.0),  # sample_c2i.py
    ("llamagen:t2i_XL_512", 7.5, 1.0, 1000, 1.0),  # sample_t2i.py
    ("lumina:768", 4.0, 1.0, 2000, 1.0),  # README
    ("anole:native", 3.0, 0.7, 0, 0.9),
    ("janus:1b", 5.0, 1.0, 0, 1.0),
    ("emu3:1:1", 3.0, 1.0, 2048, 1.0),
    ("emu3_5:4:3", 5.0, 1.0, 5120, 1.0),
    ("liquid", 7.0, 0.99, 4096, 0.96),
    ("lumina2", 4.0, 1.0, 4096, 1.0),  # README
    ("simplear", 6.0, 1.0, 0, 1.0),  # generate.py
])
def test_published_sampling(name, guidance, temperature, top_k, top_p):
  """Guidance and sampling are by default those of the authors' scripts."""
  family, variant = _CONFIGS[name]
  assert family.get_config(variant).sampling.to_dict() == dict(
      guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)


def test_lumina_sizes():
  """The crop lists have the published lengths; others are refused."""
  assert [len(lumina.sizes(t)) for t in (512, 768, 1024)] == [49, 73, 97]
  assert lumina.parse_size("768x768", 768) == (768, 768)
  with pytest.raises(UserError, match="got size '700x700'"):
    lumina.parse_size("700x700", 768)


def test_emu3_ratios():
  """Ratios give the published grids; others are refused."""
  assert emu3.grid_size("1:1", 720 * 720, 8) == (90, 90)
  assert emu3.grid_size("16:9", 720 * 720, 8) == (68, 120)
  assert emu3.grid_size("1:100", 720 * 720, 8) == (900, 9)
  for ratio in ("wide", "0:1", "1:1000", "1", "9000000:1"):
    with pytest.raises(UserError, match="got ratio"):
      emu3.grid_size(ratio, 720 * 720, 8)


@pytest.mark.parametrize("family", [
    llamagen, lumina, anole, janus, emu3, emu3_5, liquid, lumina2, simplear])
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
  prompt, _ = family.encode_prompts(["a cat"], guided=True)
  words = "Generate an image of 768x736 according to the following prompt:\n"
  opening = [8197, 8804 + 23, 8804 + 24]
  expected = [0, *map(ord, words + "a cat"), 8710, *opening]
  cond, uncond = (np.asarray(t)[np.asarray(m)].tolist()
                  for t, m in zip(prompt.tokens, prompt.mask))
  assert (cond, uncond) == (expected, opening)
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


def test_emu3_5_prompt():
  """The task with and without the text, the second with two spaces."""
  family = spelled(emu3_5.Emu35(emu3_5.get_config()))
  header = [151746, 151852, *map(ord, "55*73"), 151851]
  cond, uncond = family.streams("a cat")
  assert list(cond) == [151849, *map(
      ord, "You are a helpful assistant for t2i task. USER: a cat ASSISTANT: "),
      *header]
  assert list(uncond) == [151849, *map(
      ord, "You are a helpful assistant. USER:  ASSISTANT: "), *header]
  assert family.input_ids[[0, -2, -1]].tolist() == [151854, 282925, 151846]
  assert family.grid.length == 55 * 74 - 1


def test_emu3_5_prompt_with_images():
  """The x2i task: each image with its size and row ends, then the text."""
  family = spelled(emu3_5.Emu35(emu3_5.get_config("1:1")))
  images = [np.array([[7, 8], [9, 131_071]]), np.array([[0, 1, 2]])]
  shown = [
      151852, *map(ord, "2*2"), 151851,  # start, size, image token
      151861, 151862, 151846, 151863, 282925, 151853,  # rows, end
      151852, *map(ord, "1*3"), 151851, 151854, 151855, 151856, 151853]
  header = [151746, 151852, *map(ord, "64*64"), 151851]
  prompt, _ = family.image_prompts().encode_prompts(["a cat"], True, images)
  cond, uncond = (np.asarray(t)[np.asarray(m)].tolist()
                  for t, m in zip(prompt.tokens, prompt.mask))
  assert cond == [
      151849, *map(ord, "You are a helpful assistant for x2i task. USER: "),
      *shown, *map(ord, "a cat ASSISTANT: "), *header]
  assert uncond == [
      151849, *map(ord, "You are a helpful assistant. USER: "), *shown,
      *map(ord, " ASSISTANT: "), *header]
  first = prompt.tokens.shape[1] - len(uncond)
  assert prompt.positions[1, first:first + 2].tolist() == [0, 1]


def test_emu3_5_images_of_prompts():
  """Sizes as the authors' code rounds them; prompts of thousands of tokens."""
  family = spelled(emu3_5.Emu35(emu3_5.get_config()))
  task = family.image_prompts()
  for given, made in {(1024, 1024): (1024, 1024), (9, 9): (1024, 1024),
                      (1920, 1080): (1360, 768), (640, 480): (1184, 880),
                      (800, 100): (2896, 368)}.items():
    assert task.size(*given) == made
  assert task.output_choices(1184, 880) == {"ratio": "55x74"}
  with pytest.raises(UserError, match="got an image of 801x100 pixels"):
    task.size(801, 100)
  largest = np.zeros((181, 23), int)
  prompt, _ = task.encode_prompts(["a"], False, [largest] * 3)
  assert prompt.tokens.shape == (1, 13 * 1024)
  assert int(prompt.positions.max()) < len(family.rope)
  with pytest.raises(UserError, match="of at most 14336 tokens"):
    task.encode_prompts(["a" * 2000], False, [largest] * 3)


def test_emu3_5_grids():
  """Published ratios and explicit grids are known; others are refused."""
  assert emu3_5.grid_size("9:16") == (85, 47)
  assert emu3_5.grid_size("32x32") == (32, 32)
  for ratio in ("5:4", "0x3", "9999x9999", "32", ""):
    with pytest.raises(UserError, match="Expected ratio to be one of 4:3"):
      emu3_5.grid_size(ratio)


def test_simplear_prompt():
  """The prefix before the text; a negative prompt guides."""
  family = spelled(simplear.SimpleAR(simplear.get_config()))
  cond, uncond = family.streams("a cat")
  assert list(cond) == [
      151665, *map(ord, "A highly realistic image of a cat"), 151667]
  assert bytes(uncond[1:-1]).startswith(b"An image of aerial view, overexposed")
  assert (uncond[0], uncond[-1]) == (151665, 151667)
  assert family.input_ids[[0, -1]].tolist() == [151672, 215671]


def named_ids(family, ids):
  """The family with letters for a tokenizer and these special tokens."""
  family = spelled(dataclasses.replace(family, folder=pathlib.Path("folder")))
  family.__dict__["text_tokenizer"] = types.SimpleNamespace(
      token_to_id=ids.get)
  return family


def test_liquid_prompt():
  """The instruction behind the text; its names are the tokenizer's."""
  ids = {"<bos>": 2, "<boi>": 7, "<unconditional>": 9}
  family = named_ids(liquid.Liquid(liquid.get_config()), ids)
  cond, uncond = family.streams("a cat")
  words = "a cat Generate an image based on this description."
  assert list(cond) == [2, *map(ord, words), 7]
  assert list(uncond) == [2, 9, 7]
  assert family.input_ids[[0, -1]].tolist() == [256000, 264191]
  with pytest.raises(UserError, match="without '<boi>'. Convert again"):
    named_ids(family, {"<bos>": 2}).streams("a cat")


def test_lumina2_prompt():
  """Height before width in units of 32 px, four tokens each."""
  config = lumina2.get_config()
  config.size = "1024x512"
  names = {"<reserved08706>": 5, "<reserved08816>": 16, "<reserved08832>": 32}
  family = named_ids(lumina2.Lumina2(config), names)
  family.__dict__["_start"] = 1
  assert (family.grid.rows, family.grid.cols) == (64, 128)
  cond, uncond = family.streams("a cat")
  words = ("Generate an image of 1024x512 according to the following prompt:\n"
           "a cat")
  opening = [151665, 16, 32]
  assert list(cond) == [1, *map(ord, words), 5, *opening]
  assert list(uncond) == opening
  assert family.input_ids[[0, -2, -1]].tolist() == [155000, 171383, 151670]
  for size in ("700x512", "512", "0x32", "4096x32", "axb", "64x"):
    config.size = size
    with pytest.raises(UserError, match="Expected size to be WIDTHxHEIGHT"):
      _ = lumina2.Lumina2(config).grid


def test_simplear_ids_are_checked(monkeypatch):
  """Its own tokenizer and Qwen2.5's are taken; another one is refused."""
  def tokenizer(first, count):
    added = {name: first + i for i, name in enumerate(simplear.ADDED)}
    return types.SimpleNamespace(
        token_to_id=(added if first else {}).get,
        get_vocab_size=lambda: count)

  for first, count, is_right in ((151_665, 151_672, True), (0, 151_665, True),
                                 (151_643, 151_650, False), (0, 50, False)):
    monkeypatch.setattr(
        published.Published, "text_tokenizer", tokenizer(first, count))
    family = simplear.SimpleAR(simplear.get_config())
    if is_right:
      assert family.text_tokenizer.get_vocab_size() == count
      continue
    with pytest.raises(UserError, match="Expected SimpleAR's tokenizer"):
      _ = family.text_tokenizer


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


def test_llamagen_reads_features(tmp_path):
  """Prompts may be files of features; what is none is an error of one line."""
  family = llamagen.LlamaGen(llamagen.get_config("t2i_XL_256"))
  np.save(tmp_path / "cat.npy", np.ones((1, 3, 2048), np.float16))
  prompt, notes = family.encode_prompts([str(tmp_path / "cat.npy")], True)
  assert prompt.mask.sum() == 6 and notes == []
  assert float(prompt.features[0].sum()) == 3 * 2048
  np.save(tmp_path / "narrow.npy", np.ones((1, 3, 8)))
  (tmp_path / "torn.npy").write_bytes(b"")
  for name, said in (("narrow", "shape"), ("torn", "readable"),
                     ("lost", "readable")):
    with pytest.raises(UserError, match=said) as error:
      family.encode_prompts([str(tmp_path / f"{name}.npy")], False)
    assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="one kind"):
    family.encode_prompts([str(tmp_path / "cat.npy"), "a dog"], False)


def test_features_that_are_none_are_one_line(tmp_path):
  """Several arrays, words, nan, a flipped header; longer ones get a note."""
  file = tmp_path / "x.npy"
  read = lambda: captions.read_features([str(file)], (1, 4, 3))
  np.save(file, np.ones((9, 3)))
  whole = file.read_bytes()
  _, mask, notes = read()
  assert mask.all() and "9 words, of which the model reads the first 4" in (
      notes[0])
  for wrong in (np.full((2, 3), np.nan), np.array([["a", "b", "c"]]),
                np.array([[None] * 3])):
    np.save(file, wrong, allow_pickle=True)
    with pytest.raises(UserError, match="Expected .*x.npy"):
      read()
  with open(file, "wb") as out:
    np.savez(out, a=np.ones((2, 3)))
  with pytest.raises(UserError, match="several arrays"):
    read()
  for damaged in (whole[:40], whole.replace(b"(9, 3)", b"(9, 9999999999999)"),
                  whole.replace(b"'<f8'", b"'<q9'")):
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="Expected a readable .npy"):
      read()


_ROUNDING = ("llamagen_class", "simplear", "lumina2")


@pytest.mark.parametrize("name", ["lumina", "janus", *_ROUNDING])
def test_pixels_as_the_originals_store_them(name):
  """Some round to whole numbers, the others cut."""
  config = CONFIGS[name]()
  family = model_folder.FAMILIES[config.family](
    {"config": config.to_dict()}, None
  )
  x = np.linspace(-1.2, 1.2, 99, dtype=np.float32)
  family.__dict__["vq"] = types.SimpleNamespace(apply=lambda *a, **k: x)
  scaled = np.clip((x.astype(np.float64) + 1) / 2 * 255, 0, 255)
  whole = np.floor(scaled + 0.5) if name in _ROUNDING else scaled
  np.testing.assert_allclose(
      family.decode({}, None), whole.astype(np.uint8), atol=0)


class Words:
  """A tokenizer that has a vocabulary only."""

  def __init__(self, vocabulary):
    self.get_vocab = lambda: vocabulary


def test_chameleon_ids_are_checked(monkeypatch):
  """A tokenizer whose ids are others' is refused by the name of one."""
  digits = str.maketrans("0123456789", "ABCDEFGHIJ")
  good = {"<s>": 0, "<racm3:break>": 8197, "<reserved08706>": 8710,
          "<reserved08799>": 8803, "<reserved08800>": 8804}
  good |= {f"IMGIMG{str(c).translate(digits)}Z": 4 + c for c in range(8192)}
  for change, said in (({}, None), ({"<s>": 1}, "'?<s>"),
                       ({"IMGIMGBZ": 9}, "image tokens")):
    monkeypatch.setattr(
        published.Published, "text_tokenizer", Words(good | change))
    family = lumina.Lumina(lumina.get_config())
    if said is None:
      assert family.text_tokenizer.get_vocab()["IMGIMGBZ"] == 5
      continue
    with pytest.raises(UserError, match=said):
      _ = family.text_tokenizer


def test_emu3_ids_are_checked(tmp_path):
  """Vision tokens in another order or place, or words too few, are refused."""
  family = emu3.Emu3(emu3.get_config(), tmp_path)
  names = ["image token", "image start", "image end"] + [
      f"visual token {code:06d}" for code in range(32_768)]
  names = [f"<|{name}|>" for name in names]
  family.check_ids([*names, ""])
  for wrong in (names[::-1], ["<|extra|>"] * 7 + names, names[1:]):
    with pytest.raises(UserError, match="image (start|token)"):
      family.check_ids(wrong)
  ranks = {str(i).encode(): i for i in range(151_643)}
  family.check_ranks(ranks)
  with pytest.raises(UserError, match="got emu3.tiktoken with 151642 entries"):
    family.check_ranks({k: i for k, i in ranks.items() if i != 7})


def test_prompts_as_they_are_typed():
  """Blanks reach the model as in the original: Janus' strips the ends."""
  typed = clean(" a  red\ncat ")
  for family in (lumina.Lumina(lumina.get_config()),
                 anole.Anole(anole.get_config()),
                 emu3.Emu3(emu3.get_config())):
    ids = bytes(i for i in spelled(family).streams(typed)[0] if 0 < i < 256)
    assert b" a  red\ncat " in ids
  family = spelled(janus.Janus(janus.get_config()))
  assert family.streams(typed) == family.streams("a  red\ncat")
  assert family.streams(typed) != family.streams("a red cat")


def test_tokenizers_neither_cut_nor_pad(tmp_path, monkeypatch):
  """What a trainer left in tokenizer.json does not change a prompt."""
  (tmp_path / "tokenizer").mkdir()
  (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
  asked = []
  tokenizer = types.SimpleNamespace(
      no_truncation=lambda: asked.append("whole"),
      no_padding=lambda: asked.append("bare"))
  module = types.SimpleNamespace(
      Tokenizer=types.SimpleNamespace(from_file=lambda file: tokenizer))
  monkeypatch.setattr(published, "need", lambda *_: module)
  family = janus.Janus(janus.get_config(), tmp_path)
  assert family.text_tokenizer is tokenizer and sorted(asked) == [
      "bare", "whole"]


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


@pytest.mark.parametrize("module, key, value, said", [
    (lumina, "target_size", 0, "target_size"),
    (lumina, "target_size", 10**9, "target_size"),
    (emu3, "area", -1, "area"), (emu3, "area", 10**40, "area"),
    (emu3, "ratio", "9" * 400 + ":1", "ratio"),
    (emu3_5, "ratio", "5:4", "ratio"), (lumina2, "size", "9x9", "size"),
    (simplear, "side", 0, "rows"), (simplear, "vq.levels", (8, 8), "levels"),
    (simplear, "trunk.gate", "relu", "gate"),
    (lumina2, "trunk.qk_rms", True, "qk_rms"),
    (llamagen, "side", 0, "rows"), (llamagen, "side", 10**9, "rows x cols"),
    (llamagen, "theta", 0.0, "theta"),
    (llamagen, "theta", float("nan"), "theta"),
    (llamagen, "trunk.n_layers", 0, "n_layers"),
    (llamagen, "trunk.head_dim", 63, "head_dim"),
    (llamagen, "trunk.n_kv_heads", 7, "n_heads"),
    (llamagen, "trunk.norm_eps", -1.0, "norm_eps"),
    (llamagen, "vq.groups", 0, "groups"), (llamagen, "vq.groups", 7, "ch_mult"),
    (llamagen, "vq.ch_mult", (), "ch_mult"),
    (lumina, "ids.end_of_row", -1, "ids.end_of_row"),
    (lumina, "ids.first_code", 65_000, "ids of image tokens")])
def test_sizes_out_of_range_are_one_line(module, key, value, said):
  """Zero, below it, or far beyond: named before anything is made."""
  config = module.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=f"Expected {said} ") as error:
    family = module.from_settings({"config": config.to_dict()}, None)
    _ = family.generator, family.vq
  assert "\n" not in str(error.value)


def test_a_caption_that_cleaning_empties_is_noted():
  """Chinese for LlamaGen: the note says why the image ignores it."""
  pytest.importorskip("ftfy")
  pytest.importorskip("bs4")
  family = llamagen.LlamaGen(llamagen.get_config("t2i_XL_256"))
  family.__dict__["_end"] = 1
  _, _, notes = family._caption_ids(["\u4e2d\u6587", "a fox"])
  assert len(notes) == 1 and "nothing is left of the prompt" in notes[0]
