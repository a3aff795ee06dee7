"""Conversion: formats, checks, resumption; no PyTorch needed."""

import argparse
from collections import OrderedDict
import io
import json
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from toy_weights import write_safetensors

from ssd_jax import checkpoints, convert, hub, tensors
from ssd_jax.config import UserError
from ssd_jax.families import janus


class _Storage:
  """What a pickled tensor refers to."""

  def __init__(self, array):
    self.array = array


class _Tensor:
  """A view of a storage, pickled as torch pickles tensors."""

  def __init__(self, storage, offset, shape, strides):
    self.args = (storage, offset, shape, strides, False, OrderedDict())

  def __reduce__(self):
    return sys.modules["torch._utils"]._rebuild_tensor_v2, self.args


def _global(module, name):
  def function(*args):
    raise AssertionError(f"{module}.{name} was called")

  function.__module__, function.__qualname__ = module, name
  function.__name__ = name
  return function


@pytest.fixture
def torch_file(tmp_path, monkeypatch):
  """Writes an object with tensors as torch.save does."""
  root, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  for kind in ("FloatStorage", "BFloat16Storage"):
    setattr(root, kind, _global("torch", kind))
  utils._rebuild_tensor_v2 = _global("torch._utils", "_rebuild_tensor_v2")
  monkeypatch.setitem(sys.modules, "torch", root)
  monkeypatch.setitem(sys.modules, "torch._utils", utils)

  def write(value, name="model.pt"):
    data, storages = io.BytesIO(), []

    class Pickler(pickle.Pickler):
      def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
          return None
        storages.append(obj.array)
        kind = ("BFloat16Storage" if obj.array.dtype == ml_dtypes.bfloat16
                else "FloatStorage")
        return ("storage", getattr(root, kind), str(len(storages) - 1), "cpu",
                obj.array.size)

    Pickler(data, protocol=2).dump(value)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
      archive.writestr("model/data.pkl", data.getvalue())
      for i, array in enumerate(storages):
        archive.writestr(f"model/data/{i}", array.tobytes())
    return tmp_path / name

  return write


def test_safetensors_are_read_in_pieces(tmp_path):
  """Values, types and row ranges are those written."""
  arrays = {"a": np.arange(12, dtype=np.float32).reshape(4, 3),
            "b": np.ones((2, 5), ml_dtypes.bfloat16)}
  write_safetensors(tmp_path / "x.safetensors", arrays)
  found = tensors.read_file(tmp_path / "x.safetensors")
  assert found["b"].read().dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found["a"].read(1, 3), arrays["a"][1:3])


def test_torch_files_are_read_without_torch(torch_file):
  """Views, wrappers and a trainer's leftovers are understood."""
  data = np.arange(24, dtype=np.float32)
  half = np.arange(4).astype(ml_dtypes.bfloat16)
  file = torch_file({
      "model": OrderedDict(
          turned=_Tensor(_Storage(data), 2, (3, 4), (1, 3)),
          plain=_Tensor(_Storage(half), 0, (2, 2), (2, 1))),
      "args": argparse.Namespace(lr=1.0), "steps": 3})
  found = tensors.read_file(file)
  assert set(found) == {"turned", "plain"}
  expected = data[2:14].reshape(4, 3).T
  np.testing.assert_array_equal(found["turned"].read(), expected)
  np.testing.assert_array_equal(found["turned"].read(1, 3), expected[1:3])
  np.testing.assert_array_equal(found["plain"].read(1, 2), [[2, 3]])


def test_pickles_are_not_executed(torch_file, tmp_path):
  """A pickle that asks for a system call is refused by name."""

  class Attack:
    def __reduce__(self):
      return eval, (f"open({str(tmp_path / 'pwned')!r}, 'w')",)

  file = torch_file({"model": {"x": Attack()}})
  with pytest.raises(UserError, match="builtins.eval"):
    tensors.read_file(file)
  assert not (tmp_path / "pwned").exists()


def tiny():
  """Settings of a Janus of toy size."""
  config = janus.get_config("1b")
  config.trunk.update(d_model=8, n_layers=3, n_heads=2, n_kv_heads=1,
                      head_dim=4, d_ff=12, vocab_in=15 + 6, vocab_out=6,
                      head_hidden=10)
  config.vq.update(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=4,
                   n_codes=6, code_dim=8, attn_levels=(1,), groups=2)
  return config


def published(recipe):
  """Random tensors with the names and shapes of a recipe's first part."""
  rng = np.random.default_rng(0)
  shapes = {s.name: s.shape for row in recipe.parts[0].table.rows
            for s in row.sources}
  return {name: rng.normal(size=shape).astype(np.float32)
          for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path):
  """A toy checkpoint in two shards."""
  folder = tmp_path / "source"
  folder.mkdir()
  write_source(folder, published(janus.recipe(tiny())))
  return folder


def write_source(folder, arrays):
  names, index = sorted(arrays), {}
  for i, part in enumerate((names[::2], names[1::2])):
    file = f"model-{i}.safetensors"
    write_safetensors(folder / file, {name: arrays[name] for name in part})
    index |= dict.fromkeys(part, file)
  (folder / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": index}))
  (folder / "tokenizer.json").write_text("{}")


def run(source, out, dtype="float32", progress=lambda n: None):
  """Converts the toy checkpoint."""
  job = convert.open_job(janus.recipe(tiny()), {"source": source}, dtype)
  return convert.convert(job, out, progress)


def test_every_tensor_lands_in_its_place(source, tmp_path):
  """Stacked layers, joined tables and heads hold the published numbers."""
  arrays = published(janus.recipe(tiny()))
  report = run(source, tmp_path / "out")
  trunk = checkpoints.restore(tmp_path / "out" / "trunk")
  at = lambda name: arrays[f"language_model.model.{name}.weight"]
  np.testing.assert_array_equal(
      trunk["layers"]["attn"]["q"][2, :, 1],
      at("layers.2.self_attn.q_proj").T[:, 4:])
  np.testing.assert_array_equal(
      trunk["layers"]["attn"]["o"][0, 1], at("layers.0.self_attn.o_proj").T[4:])
  np.testing.assert_array_equal(trunk["embedding"][:15], at("embed_tokens"))
  assert trunk["embedding"].shape == (21, 8)
  assert np.all(np.any(trunk["embedding"][15:], axis=1))
  np.testing.assert_array_equal(
      checkpoints.restore(tmp_path / "out" / "vq")["codebook"],
      arrays["gen_vision_model.quantize.embedding.weight"])
  assert report["parameters"]["trunk"] == sum(
      x.size for x in _leaves(trunk))
  assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()


def _leaves(tree):
  for value in tree.values():
    yield from _leaves(value) if isinstance(value, dict) else [value]


def test_dtype_is_chosen(source, tmp_path):
  """The trunk is stored in the dtype asked for, the tokenizer in float32."""
  run(source, tmp_path / "out", "bfloat16")
  trunk = checkpoints.restore(tmp_path / "out" / "trunk")
  assert {x.dtype for x in _leaves(trunk)} == {np.dtype(ml_dtypes.bfloat16)}
  vq = checkpoints.restore(tmp_path / "out" / "vq")
  assert {x.dtype for x in _leaves(vq)} == {np.dtype(np.float32)}


def test_an_interrupted_conversion_goes_on(source, tmp_path, monkeypatch):
  """Nothing appears before the end; what was done is not done again."""
  out, count = tmp_path / "out", 0
  expected = run(source, tmp_path / "whole")

  def stop(_):
    nonlocal count
    count += 1
    if count == 20:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(source, out, progress=stop)
  assert not out.exists()
  written, write = [], convert._write_unit
  monkeypatch.setattr(convert, "_write_unit", lambda job, work, unit: (
      written.append(unit.name), write(job, work, unit))[1])
  report = run(source, out)
  assert report["arrays"] == expected["arrays"]
  assert len(written) == len(expected["arrays"]) - 20
  assert not list(tmp_path.glob(".out*"))
  before = (out / "report.json").stat().st_mtime_ns
  assert run(source, out) == report  # says it is done
  assert (out / "report.json").stat().st_mtime_ns == before


def _truncate(folder):
  file = folder / "model-0.safetensors"
  file.write_bytes(file.read_bytes()[:-7])


def _rewrite(change):
  def run_change(folder):
    arrays = published(janus.recipe(tiny()))
    change(arrays)
    write_source(folder, arrays)

  return run_change


def _other_family(arrays):
  arrays.clear()
  arrays["layers.0.attention.wqkv.weight"] = np.zeros((3, 3), np.float32)


def _duplicate(folder):
  name = "gen_embed.weight"
  extra = {name: np.zeros((6, 8), np.float32)}
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  write_safetensors(folder / "extra.safetensors", extra)
  index["weight_map"]["x"] = "extra.safetensors"
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _twice(folder):
  file = folder / "model-0.safetensors"
  data = file.read_bytes()
  size = int.from_bytes(data[:8], "little")
  entry = b'"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, '
  header = b"{" + entry + entry + data[9:8 + size]
  file.write_bytes(
      len(header).to_bytes(8, "little") + header + data[8 + size:])


@pytest.mark.parametrize("damage, said", [
    (_truncate, "truncated"),
    (_twice, "x twice"),
    (lambda f: (f / "model-1.safetensors").unlink(), "model-1.safetensors"),
    (lambda f: (f / "tokenizer.json").unlink(), "--tokenizer"),
    (lambda f: (f / "model.safetensors.index.json").write_text("{"),
     "weight_map"),
    (_duplicate, "in both"),
    (_rewrite(_other_family), "looks like llamagen"),
    (_rewrite(lambda a: a.update(new=np.zeros(2, np.float32))),
     r"1 unknown tensors \(new\)"),
    (_rewrite(lambda a: a.pop("gen_embed.weight")),
     r"1 missing tensors \(gen_embed"),
    (_rewrite(lambda a: a.update(
        {"gen_head.vision_head.bias": np.zeros(7, np.float32)})),
     r"1 misshaped tensors .*\(7,\) for \(6,\)"),
])
def test_wrong_checkpoints_are_named(source, tmp_path, damage, said):
  """What is wrong is said in one line, and nothing is written."""
  damage(source)
  with pytest.raises(UserError, match=said) as error:
    run(source, tmp_path / "out")
  assert "\n" not in str(error.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_full_disk_is_noticed_first(source, tmp_path, monkeypatch):
  """Too little space is an error before anything is written."""
  usage = types.SimpleNamespace(free=100)
  monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
  with pytest.raises(UserError, match="GB free"):
    run(source, tmp_path / "out")
  assert not list(tmp_path.glob("*out*"))


def test_other_folders_are_left_alone(source, tmp_path):
  """A target with other content is an error."""
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "diary").write_text("dear")
  with pytest.raises(UserError, match="something else"):
    run(source, tmp_path / "out")


class FakeHub(types.ModuleType):
  """huggingface_hub over a local folder."""

  def __init__(self, folder, error=None):
    super().__init__("huggingface_hub")
    self.folder, self.error, self.fetched = folder, error, []

  def HfApi(self):
    return self

  def list_repo_files(self, name, revision=None):
    if self.error:
      raise self.error
    return [str(p.relative_to(self.folder)) for p in self.folder.rglob("*")
            if p.is_file()]

  def hf_hub_download(self, name, file, revision=None):
    self.fetched.append(file)
    return str(self.folder / file)


def test_only_what_is_needed_is_downloaded(source, monkeypatch):
  """An index brings its shards, not everything in the repository."""
  fake = FakeHub(source)
  (source / "pytorch_model.bin").write_text("not needed")
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
  recipe = janus.recipe(tiny())
  wanted = [recipe.parts[0].inside, recipe.tokenizer]
  assert hub.folder_of("hf:a/b", wanted) == source
  assert sorted(fake.fetched) == [
      "model-0.safetensors", "model-1.safetensors",
      "model.safetensors.index.json", "tokenizer.json"]


def test_hub_errors_are_one_line(source, monkeypatch):
  """A gated or absent repository tells what to do."""
  fake = FakeHub(source, OSError("403 Client Error\nmore"))
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
  with pytest.raises(UserError, match="HF_TOKEN") as error:
    hub.folder_of("hf:a/b", [("x",)])
  assert "\n" not in str(error.value)
