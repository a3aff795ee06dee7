"""Every family, converted from its published layout, against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import ssd_jax
from ssd_jax import families
from ssd_jax.convert import convert
from ssd_jax.convert.registry import RECIPES
from ssd_jax.decoding import engine, sampling
from ssd_jax.decoding.ar import AR
from tests.parity.references import FAMILIES, TEXTS
from tests.support.toy_weights import CODES

_GUIDANCE = 2.5


class Case:
  """A reference and the family converted from its files."""

  def __init__(self, name, folder):
    self.reference = FAMILIES[name]()
    source, out = folder / "source", folder / "model"
    source.mkdir()
    self.reference.save(source)
    recipe = RECIPES[self.reference.config.family](self.reference.config)
    folders = {"source": source}
    if name == "llamagen_text":
      folders["text_encoder"] = source
    convert.convert(convert.open_job(recipe, folders, "float32"), out)
    self.folder = out
    pipe = ssd_jax.load(out)
    self.family, self.params = pipe.family, pipe.params
    self.vq_params = pipe.vq_params
    self.texts = ["3", "7"] if name == "llamagen_class" else list(TEXTS)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
  return Case(request.param, tmp_path_factory.mktemp(request.param))


def _sequences(reference):
  """int [2, N] of random codes, end-of-row tokens in their places."""
  codes = np.random.default_rng(0).integers(0, CODES, (2, reference.length))
  return np.array([reference.sequence(row) for row in codes])


def test_logits(case):
  """Logits of both streams at every slot are those of the original."""
  family = case.family
  prompt, _ = family.encode_prompts(case.texts, True)
  sequences = _sequences(case.reference)
  generator = family.generator
  logits = jax.jit(lambda params, *args: generator.logits(
      params, generator.hidden(params, *args)))
  ours = np.asarray(logits(
      case.params, prompt, jnp.asarray(np.concatenate([sequences] * 2))))
  theirs = np.stack([
      case.reference.logits(text, conditional, list(tokens[:-1]))
      for conditional in (True, False)
      for text, tokens in zip(case.texts, sequences)])
  error = np.abs(ours - theirs).max() / theirs.std()
  print(f"\nlogits {family.name}: {error:.1e} of their spread")
  assert error < 1e-4


def test_logits_after_images(case, monkeypatch):
  """Images become the original's codes, which its trunk reads as ours does."""
  reference, family = case.reference, case.family
  if family.name != "emu3_5":
    pytest.skip("a family of text prompts")
  rng = np.random.default_rng(4)
  blocks = rng.integers(0, 256, (2, 4, 6, 3), np.uint8)
  pictures = [x.repeat(2, 0).repeat(2, 1) for x in blocks]  # 12 x 8 pixels
  pixels = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
  grids = reference.encode(pixels).numpy()
  assert len(np.unique(grids)) > 2
  assert ssd_jax.load(case.folder, images=pictures[:1]).image_shape == (
      8, 12, 3)
  pipe = ssd_jax.load(case.folder, images=pictures)
  prompt, _ = pipe.prompt_encoder(pictures)(case.texts, True)
  sequences = _sequences(reference)
  ours = np.asarray(pipe.programs.stream_logits(
      pipe.params, prompt, jnp.asarray(sequences)))
  monkeypatch.setattr(reference, "images", grids)
  theirs = np.stack([
      reference.logits(text, conditional, list(tokens[:-1]))
      for conditional in (True, False)
      for text, tokens in zip(case.texts, sequences)])
  error = np.abs(ours.reshape(theirs.shape) - theirs).max() / theirs.std()
  print(f"\nlogits after images {family.name}: {error:.1e} of their spread")
  assert error < 1e-4


def test_greedy_tokens(case):
  """Guided greedy decoding with the cache generates the original's image."""
  family = case.family
  prompt, _ = family.encode_prompts(case.texts, True)
  settings = sampling.Sampling.make(guidance=_GUIDANCE, top_k=1)
  decoded = engine.decode(
      family.generator.model(), AR(), case.params, prompt, settings,
      jax.random.key(0), jnp.arange(2))
  for text, picture in zip(case.texts, np.asarray(decoded.tokens)):
    assert picture.tolist() == _greedy(case.reference, text)


def _greedy(reference, text):
  """The image's rows."""
  tokens, picture = [], [[]]
  for slot in range(reference.length):
    if reference.is_row_end(slot):
      tokens.append(CODES)
      continue
    if len(picture[-1]) == reference.cols:
      picture.append([])
    cond, uncond = (reference.logits(text, stream, tokens)[-1]
                    for stream in (True, False))
    tokens.append(int(np.argmax(uncond + _GUIDANCE * (cond - uncond))))
    picture[-1].append(tokens[-1])
  return picture


def test_pictures(case):
  """Codes become the original's pixels, and pixels its codes."""
  family = case.family
  shape = (2, case.reference.rows, case.reference.cols)
  codes = np.random.default_rng(1).integers(0, CODES, shape)
  apply = jax.jit(family.vq.apply, static_argnames="method")
  vq = lambda x, method: np.asarray(
      apply({"params": case.vq_params}, jnp.asarray(x), method=method))
  ours = vq(codes, "decode")
  theirs = case.reference.decode(torch.tensor(codes)).permute(0, 2, 3, 1)
  error = np.abs(ours - theirs.numpy()).max() / theirs.std().item()
  print(f"\npixels {family.name}: {error:.1e} of their spread")
  assert error < 1e-4
  rng, cell = np.random.default_rng(2), family.vq.cfg.downsample
  blocks = rng.uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
  pixels = blocks.repeat(cell, 1).repeat(cell, 2)
  again = case.reference.encode(torch.tensor(pixels).permute(0, 3, 1, 2))
  latents = vq(pixels, "encode")
  assert np.array_equal(vq(latents, "quantize"), again.numpy())
  assert len(np.unique(again)) > 2
  assert family.decode(case.vq_params, codes).dtype == np.uint8


_VOCABULARIES = {"lumina": 8192, "anole": 8192, "janus": 16384,
                 "emu3": 32768, "llamagen": 16384, "simplear": 64_000,
                 "liquid": 8192, "lumina2": 16384, "emu3_5": 131_072}


@pytest.mark.parametrize("name", _VOCABULARIES)
def test_sampling_distribution(name):
  """The default distribution is what transformers' own steps make of the
  logits."""
  distribution = getattr(families, name).get_config().sampling
  logits = 4 * np.random.default_rng(3).normal(
      size=(2, 3, _VOCABULARIES[name]))
  cond, uncond = torch.tensor(logits, dtype=torch.float32)
  scores = uncond + distribution.guidance * (cond - uncond)
  steps = [transformers.TemperatureLogitsWarper(distribution.temperature)]
  steps += (
    [transformers.TopKLogitsWarper(distribution.top_k)]
    if distribution.top_k
    else []
  )
  steps += (
    [transformers.TopPLogitsWarper(distribution.top_p)]
    if distribution.top_p < 1
    else []
  )
  for step in steps:
    scores = step(None, scores)
  ours = sampling.target(
      jnp.asarray(logits, jnp.float32), sampling.Sampling.make(**distribution))
  np.testing.assert_allclose(ours, scores.softmax(-1).numpy(), atol=1e-6)
