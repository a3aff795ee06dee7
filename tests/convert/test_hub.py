"""Checkpoints in places, near and far: what is looked for and fetched."""

import json
import sys
import types

import pytest

from ssd_jax.convert import (
  hub,
  janus as convert_janus,
  llamagen as convert_llamagen,
  registry,
)
from ssd_jax.core.config import UserError
from ssd_jax.families import janus, llamagen

_NEEDED = ["model-0.safetensors", "model-1.safetensors",
           "model.safetensors.index.json", "tokenizer.json"]


@pytest.fixture
def source(tmp_path):
  """A folder with the names of a checkpoint in two shards."""
  for name in _NEEDED:
    (tmp_path / name).write_text("")
  (tmp_path / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": dict(enumerate(_NEEDED[:2]))}))
  return tmp_path


def _recipe():
  return convert_janus.recipe(janus.get_config())


class FakeHub(types.ModuleType):
  """huggingface_hub over folders, by name, one of which is out of reach."""

  def __init__(self, folders, error=None, kept=None):
    super().__init__("huggingface_hub")
    self.folders, self.error, self.kept = folders, error, kept
    self.fetched = []

  def HfApi(self):
    return self

  def model_info(self, name, revision=None, timeout=None):
    if self.error:
      raise self.error
    return types.SimpleNamespace(siblings=[
        types.SimpleNamespace(rfilename=str(p.relative_to(self.folders[name])))
        for p in self.folders[name].rglob("*") if p.is_file()])

  def snapshot_download(self, name, revision=None, local_files_only=False):
    assert local_files_only
    if not self.kept:
      raise LookupError("nothing kept")
    return str(self.kept)

  def hf_hub_download(self, name, file, revision=None, local_files_only=False):
    assert local_files_only == bool(self.error)
    self.fetched.append(file)
    return str((self.kept or self.folders[name]) / file)


def places(monkeypatch, fake, **sources):
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
  return {flag: hub.Location(source) for flag, source in sources.items()}


def test_only_what_is_needed_is_downloaded(source, monkeypatch):
  """An index brings its shards, not everything in the repository."""
  fake = FakeHub({"a/b": source})
  (source / "pytorch_model.bin").write_text("not needed")
  given = places(monkeypatch, fake, source="hf:a/b")
  assert registry.fetched(_recipe(), given) == {"source": source}
  assert sorted(fake.fetched) == _NEEDED


def test_nothing_is_downloaded_before_all_is_found(source, monkeypatch):
  """A repository that lacks the tokenizer costs a listing, no weights."""
  fake = FakeHub({"a/b": source})
  (source / "tokenizer.json").unlink()
  given = places(monkeypatch, fake, source="hf:a/b")
  with pytest.raises(UserError, match="--tokenizer"):
    registry.fetched(_recipe(), given)
  assert not fake.fetched


def test_the_text_encoder_brings_its_tokenizer(tmp_path, monkeypatch):
  """A remote place serves what a local folder in its stead would."""
  repositories = {
      "a/trunk": ("t2i_XL_stage1_256.pt", "vq_ds16_t2i.pt"),
      "a/t5": ("model.safetensors", "tokenizer.json", "README.md")}
  for name, files in repositories.items():
    (tmp_path / name).mkdir(parents=True)
    for file in files:
      (tmp_path / name / file).write_text("")
  recipe = convert_llamagen.recipe(llamagen.get_config("t2i_XL_256"))
  for prefix in ("hf:", f"{tmp_path}/"):
    fake = FakeHub({name: tmp_path / name for name in repositories})
    given = places(monkeypatch, fake, source=f"{prefix}a/trunk",
                   text_encoder=f"{prefix}a/t5")
    assert registry.fetched(recipe, given)["text_encoder"] == tmp_path / "a/t5"
    assert fake.fetched == ([] if prefix != "hf:" else [
        "t2i_XL_stage1_256.pt", "vq_ds16_t2i.pt", "model.safetensors",
        "tokenizer.json"])


def test_what_was_fetched_serves_without_a_network(source, monkeypatch):
  """Out of reach, the files that are kept on this machine are taken."""
  fake = FakeHub({}, OSError("no route"), kept=source)
  given = places(monkeypatch, fake, source="hf:a/b")
  assert registry.fetched(_recipe(), given) == {"source": source}
  assert sorted(fake.fetched) == _NEEDED


def test_hub_errors_are_one_line(monkeypatch):
  """A gated or absent repository tells what to do."""
  fake = FakeHub({}, OSError("403 Client Error\nmore"))
  given = places(monkeypatch, fake, source="hf:a/b")
  with pytest.raises(UserError, match="403.*HF_TOKEN") as error:
    given["source"].folder([("x",)])
  assert "\n" not in str(error.value)
