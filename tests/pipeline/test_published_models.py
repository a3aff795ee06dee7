"""Published models by name; a toy stands in for their repositories."""

import math

import pytest

import ssd_jax
from ssd_jax.convert import hub, janus
from ssd_jax.convert.registry import RECIPES
from ssd_jax.core.config import UserError
from ssd_jax.pipeline import published_models
from ssd_jax.pipeline.published_models import CATALOG, Published
from tests.convert.test_convert import published, tiny, write_source

_SIZES = {(model.config.family, model.variant): model
          for model in CATALOG.values()}


@pytest.mark.slow
@pytest.mark.parametrize("key", _SIZES, ids=":".join)
def test_sizes_are_those_of_the_recipes(key):
  """Parameters and bytes that the list shows are those of a conversion."""
  model = _SIZES[key]
  counts = dict.fromkeys(("trunk", "vq", "text"), 0)
  for part in RECIPES[key[0]](model.config).parts:
    for path, leaf in part.leaves.items():
      counts[path.split("/")[0]] += math.prod(leaf.shape)
  assert counts == {name: getattr(model, name) for name in counts}


def test_places_are_flags_of_the_conversion():
  """Each model has a trunk's place, and no place that its recipe lacks."""
  for name, model in CATALOG.items():
    assert "source" in model.places, name
    assert set(model.places) <= {"source", "vq", "text_encoder", "tokenizer"}
    assert all(at.startswith(hub.PREFIX) for at in model.places.values())


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """A catalog of one toy model; the list of what was opened at its place."""
  source, opened = tmp_path / "source", []
  source.mkdir()
  write_source(source, published(janus.recipe(tiny())))

  class Place(hub.Location):
    def folder(self, patterns):
      opened.append(self.source)
      return source

    def has(self, patterns):
      return True

  monkeypatch.setattr(hub, "Location", Place)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.chdir(tmp_path)
  model = Published(lambda variant: tiny(), "", {"source": "hf:a/toy"}, 1, 1,
                    "none")
  monkeypatch.setattr(published_models, "CATALOG", {"toy": model})
  return opened


def test_a_name_is_converted_once(toy, tmp_path):
  """A name and its repository are one model, fetched the first time only."""
  assert ssd_jax.load("toy").family.name == "janus"
  folder = published_models.resolve("hf:a/toy")
  assert folder == tmp_path / "cache" / "ssd_jax" / "models" / "toy"
  assert toy == ["hf:a/toy"]


def test_a_folder_of_that_name_comes_first(toy, tmp_path):
  """A model folder made before stays what its name means."""
  (tmp_path / "toy").mkdir()
  (tmp_path / "toy" / "model.json").write_text("{}")
  assert published_models.resolve("toy") == "toy"
  assert published_models.resolve("elsewhere") == "elsewhere" and not toy


def test_unknown_repositories_are_one_line(toy):
  """A repository that is in no catalog is refused before anything is opened."""
  with pytest.raises(UserError, match="got hf:a/other"):
    published_models.resolve("hf:a/other")
  assert not toy
