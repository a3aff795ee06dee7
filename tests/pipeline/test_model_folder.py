"""Models made from settings: random weights, memory, open choices."""

import json

import jax
import numpy as np
import pytest

import ssd_jax
from ssd_jax.core.config import UserError
from ssd_jax.families import lumina
from ssd_jax.pipeline import model_folder
from ssd_jax.runtime import memory
from tests.support.toy_families import CONFIGS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["janus", "llamagen_text"])
def test_random_weights_need_no_files(name):
  """Settings alone make a pipeline, whose prompts are reported to be stand-
  ins."""
  pipe = model_folder.from_config(CONFIGS[name]())
  prompt, notes = pipe.family.encode_prompts(["a cat"], guided=True)
  assert prompt.tokens.shape[0] == 2 and "random" in notes[0]
  grid = pipe.model.grid
  codes = np.zeros((1, grid.rows, grid.cols), np.int32)
  pictures = jax.eval_shape(pipe.family.decode, pipe.vq_params, codes)
  side = pipe.family.vq.cfg.downsample
  assert pictures.shape == (1, side * grid.rows, side * grid.cols, 3)
  assert pictures.dtype == np.uint8


def test_memory_is_looked_at_first(monkeypatch):
  """A trunk that does not fit with tokenizer and cache is never made."""
  family = lumina.Lumina(lumina.get_config())
  # Two streams of 48 rows, of 49 tokens but for the last.
  cache = 2 * 32 * 2 * 32 * (48 * 49 - 1) * 128
  needed = 4 * (6_778_500_000 + cache + 68_700_000)
  monkeypatch.setattr(memory, "free_bytes", lambda: int(0.998 * needed))
  with pytest.raises(UserError, match="got a trunk of 6.8 billion"):
    model_folder.from_config(family.config)
  monkeypatch.setattr(memory, "free_bytes", lambda: int(1.002 * needed))
  model_folder._check_memory(family, model_folder._shapes(family), None)


def test_random_weights_are_those_of_init():
  """Made one by one to spare memory, arrays are those of the whole."""
  config = CONFIGS["llamagen_class"]()
  family = model_folder.FAMILIES[config.family](
    {"config": config.to_dict()}, None
  )
  made = model_folder.random_params(family)
  jax.tree.map(np.testing.assert_array_equal, made,
               jax.jit(family.generator.init)(jax.random.key(0)))


def test_choices_of_a_made_model():
  """Size and ratio are open until generating; what weights fix is not."""
  settings = {"family": "lumina", "config": lumina.get_config().to_dict()}
  model_folder.choose(settings, {"size": "1024x576", "sampling.top_k": 7})
  family = lumina.from_settings(settings, None)
  assert (family.grid.rows, family.grid.cols) == (36, 64)
  assert family.sampling["top_k"] == 7
  for key, said in (("trunk.n_layers", "made model"), ("theta", "made model")):
    with pytest.raises(UserError, match=said):
      model_folder.choose(settings, {key: 3})


@pytest.mark.parametrize("given,said", [
    (dict(name=3), "Expected name to be the name of a folder.*, got name=3"),
    (dict(name=None), "Expected name to be the name.*, got name=None"),
    (dict(heads=3), "Expected heads to be the name.*, got heads=3"),
    (dict(choices=3), "Expected choices to be a dict.*, got choices=3"),
    (dict(choices={"colour": 3}), "Expected only sampling.*colour"),
    (dict(choices={"sampling.colour": 3}), "top_p, got 'colour' in sampling"),
    (dict(choices={"sampling": 3}), "top_p, got 3 in sampling"),
])
def test_a_model_that_cannot_be_named_so_is_one_line(given, said):
  """The error comes before any file is read."""
  with pytest.raises(UserError, match=said):
    ssd_jax.load(**given)


@pytest.mark.parametrize("change", [
    lambda x: x.update(words=x["words"].replace("red", "rad", 1)),
    lambda x: x["config"]["trunk"].update(interleaved=False),
    lambda x: x["config"].update(prompt_slots=23)])
def test_settings_that_mean_another_model_are_one_line(tmp_path, change):
  """A changed word or layout would draw, but as another model."""
  settings = json.loads((model_folder.EMBEDDED / "model.json").read_text())
  assert model_folder.read_settings("emoji") == settings
  settings["config"]["sampling"]["temperature"] = 0.5  # the user's to change
  (tmp_path / "model.json").write_text(json.dumps(settings))
  assert model_folder.read_settings(tmp_path) == settings
  change(settings)
  (tmp_path / "model.json").write_text(json.dumps(settings))
  with pytest.raises(UserError, match="Expected the settings .*got changed"):
    ssd_jax.load(tmp_path)


@pytest.mark.parametrize("change", [
    lambda x: x.pop("config"), lambda x: x.pop("words"),
    lambda x: x.update(family=["x"]), lambda x: x["config"].pop("trunk"),
    lambda x: x["config"]["sampling"].pop("top_k"),
    lambda x: x["config"].update(trunk=3), lambda x: x.update(words=[])])
def test_a_damaged_model_json_is_one_line(tmp_path, change):
  """Settings that lack something are refused before weights are read."""
  settings = json.loads((model_folder.EMBEDDED / "model.json").read_text())
  change(settings)
  del settings["checksum"]
  (tmp_path / "model.json").write_text(json.dumps(settings))
  with pytest.raises(UserError, match="model.json") as error:
    ssd_jax.load(tmp_path)
  assert "\n" not in str(error.value)
