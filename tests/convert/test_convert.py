"""Conversion: checks and resumption; no PyTorch needed."""

import json
import os
import pathlib
import random
import resource
import shutil
import types

import ml_dtypes
import numpy as np
import pytest

from ssd_jax.convert import convert, janus, output_folder
from ssd_jax.convert.registry import RECIPES
from ssd_jax.core.config import UserError
from ssd_jax.families import janus as family
from ssd_jax.storage import checkpoints
from tests.support.damage import damaged
from tests.support.toy_families import glm_image_config
from tests.support.toy_weights import write_safetensors


def tiny():
  """Settings of a Janus of toy size."""
  config = family.get_config("1b")
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
  (folder / "tokenizer.json").write_text(tokenizer())


def tokenizer(words=("a", "red")):
  """Janus' tokenizer.json, of a few words."""
  vocabulary = ("<unk>", "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>",
                "<begin_of_image>", *words)
  return json.dumps({
      "version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
      "model": {"type": "WordLevel", "unk_token": "<unk>",
                "vocab": {word: i for i, word in enumerate(vocabulary)}}})


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


class Stop(BaseException):
  """A process that is killed."""


def stopped(source, out, at):
  """Starts a conversion that is killed after so many pieces."""
  left = iter(range(at - 1, -1, -1))

  def progress(_):
    if next(left) == 0:
      raise Stop

  with pytest.raises(Stop):
    run(source, out, progress=progress)
  return out.with_name(f".{out.name}.converting")


def test_a_torn_journal_is_mended(source, tmp_path):
  """A line cut by a kill spoils neither the next run nor the one after it."""
  work = stopped(source, tmp_path / "out", 20)
  journal = work / "journal.jsonl"
  journal.write_bytes(journal.read_bytes()[:-30])
  stopped(source, tmp_path / "out", 25)
  lines = journal.read_text().splitlines()
  assert len(lines) == 26 and all(json.loads(line) for line in lines)
  run(source, tmp_path / "out")


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(bytes(file.stat().st_size)),
    lambda file: file.write_bytes(b"x")])
def test_what_the_disk_lost_is_written_again(source, tmp_path, damage):
  """The journal is not believed: pieces that differ from it are redone."""
  work = stopped(source, tmp_path / "out", 20)
  layers = work / "arrays" / "trunk" / "layers.attn.q"
  damage(next(f for f in layers.iterdir() if f.name.startswith("0.")))
  run(source, tmp_path / "out")
  expected = published(janus.recipe(tiny()))
  trunk = checkpoints.restore(tmp_path / "out" / "trunk")
  np.testing.assert_array_equal(
      trunk["layers"]["attn"]["q"][0, :, 0],
      expected["language_model.model.layers.0.self_attn.q_proj.weight"].T[:, :4]
  )


def test_every_rename_can_be_the_last(source, tmp_path, monkeypatch):
  """Killed before a step of the assembly, and again, it still ends."""
  rename, count, out = os.rename, 0, tmp_path / "out"
  is_array = lambda path: "arrays" in str(path)
  for is_last in (
      lambda a, b, n: is_array(a) and n == 1,  # its place has been cleared
      lambda a, b, n: is_array(a) and n == 9,
      lambda a, b, n: is_array(b) and n == 3,  # on the way back
      lambda a, b, n: b == out):

    def kill(a, b, is_last=is_last):
      nonlocal count
      count += is_array(a) or is_array(b)
      if is_last(a, b, count):
        raise Stop
      rename(a, b)

    count = 0
    monkeypatch.setattr(convert.os, "rename", kill)
    with pytest.raises(Stop):
      run(source, out)
    assert not out.exists()
  monkeypatch.setattr(convert.os, "rename", rename)
  run(source, out)
  np.testing.assert_array_equal(
      checkpoints.restore(out / "trunk")["embedding"][:15],
      published(janus.recipe(tiny()))[
          "language_model.model.embed_tokens.weight"])


def test_leftovers_of_a_finished_conversion_go(source, tmp_path, monkeypatch):
  """Killed after the last rename, the next run removes the workplace."""
  remove = shutil.rmtree

  def kill(path, *args, **kwargs):
    if str(path).endswith(".converting"):
      raise Stop
    remove(path, *args, **kwargs)

  monkeypatch.setattr(convert.shutil, "rmtree", kill)
  with pytest.raises(Stop):
    run(source, tmp_path / "out")
  assert list(tmp_path.glob(".out*"))
  monkeypatch.setattr(convert.shutil, "rmtree", remove)
  run(source, tmp_path / "out")
  assert not list(tmp_path.glob(".out*"))


def test_a_corrected_tokenizer_is_another_conversion(source):
  """A folder made with other files of the tokenizer is not called done."""
  opened = lambda: convert.open_job(
      janus.recipe(tiny()), {"source": source}, "float32").fingerprint
  before = opened()
  assert opened() == before
  (source / "tokenizer.json").write_text(tokenizer(("a", "blue")))
  assert opened() != before


def test_a_write_that_fails_is_one_line(source, tmp_path):
  """A disk that fills up on the way is reported, and the run can go on."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
  try:
    with pytest.raises(UserError, match="Expected a disk") as error:
      run(source, tmp_path / "out")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "\n" not in str(error.value)
  run(source, tmp_path / "out")


def _truncate(folder):
  file = folder / "model-0.safetensors"
  file.write_bytes(file.read_bytes()[:-7])


def _rewrite(change):
  def run_change(folder):
    arrays = published(janus.recipe(tiny()))
    change(arrays)
    write_source(folder, arrays)

  return run_change


def _number(value):
  """Changes a number of a norm."""
  return _rewrite(lambda a: a["language_model.model.norm.weight"].put(3, value))


def _pointer(name):
  """Puts a pointer of Git LFS in the place of a file."""
  text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
  return lambda folder: (folder / name).write_text(text)


def _integers(arrays):
  name = "language_model.model.layers.0.self_attn.q_proj.weight"
  arrays[name] = arrays[name].astype(np.int8)


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
    (_truncate, "a damaged .*model-0.safetensors"),
    (_twice, r"\(x\)"),
    (lambda f: (f / "model-1.safetensors").unlink(), "model-1.safetensors"),
    (lambda f: (f / "tokenizer.json").unlink(), "--tokenizer"),
    (lambda f: (f / "model.safetensors.index.json").write_text("{"),
     "weight_map"),
    (_duplicate, "in both"),
    (_number(np.nan), r"nan or inf in language_model.model.norm.weight in .*"),
    (_number(np.inf), "nan or inf"),
    (_rewrite(_integers), "q_proj.weight in I8 in .*not quantised"),
    (_pointer("model-0.safetensors"), "pointer of Git LFS"),
    (_pointer("model.safetensors.index.json"), "pointer of Git LFS"),
    (_pointer("tokenizer.json"), "pointer of Git LFS"),
    (lambda f: (f / "tokenizer.json").write_text(""), "the empty .*tokenizer"),
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


@pytest.mark.quick(1)
@pytest.mark.parametrize("seed", range(5, 9))
def test_any_damage_of_a_source_is_one_line_or_none(source, seed):
  """Heads of safetensors, index and tokenizer: all that opens can be read."""
  rng = random.Random(seed)
  files = sorted(source.iterdir())
  for _ in range(40):
    file = rng.choice(files)
    data = file.read_bytes()
    head = damaged(data[:2000], rng.choice(files).read_bytes(), rng)
    file.write_bytes(head + data[2000:])
    try:
      job = convert.open_job(
          janus.recipe(tiny()), {"source": source}, "float32")
      for unit in job.units():
        for one in unit.row.sources:
          job.found[0].tensors[one.name].read()
    except UserError as error:
      assert "\n" not in str(error)
    file.write_bytes(data)


@pytest.mark.parametrize("text, said", [
    ("{}", "a damaged .*source/tokenizer.json"),
    (tokenizer([str(i) for i in range(90)] + ["a", "red"]), "ids below 21"),
    (tokenizer().replace("<begin_of_image>", "x"), "Janus-Pro's tokenizer")])
def test_a_tokenizer_is_tried_before_it_is_taken(source, text, said):
  """One that cannot spell a text for this trunk ends in one line."""
  pytest.importorskip("tokenizers")
  (source / "tokenizer.json").write_text(text)
  with pytest.raises(UserError, match=said) as error:
    convert.open_job(janus.recipe(tiny()), {"source": source}, "float32")
  assert "\n" not in str(error.value)


def test_links_and_dots_lead_to_the_folder_meant(source, tmp_path, monkeypatch):
  """An --out of ../x or a link: its target holds the model, the link stays."""
  (tmp_path / "here").mkdir()
  (tmp_path / "disk" / "empty").mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
  monkeypatch.chdir(tmp_path / "here")
  run(source, pathlib.Path("../x"))
  run(source, tmp_path / "link")
  assert (tmp_path / "x" / "model.json").is_file()
  assert (tmp_path / "link").is_symlink()
  assert (tmp_path / "disk" / "empty" / "model.json").is_file()
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      "disk", "here", "link", "source", "x"]


def test_the_current_folder_is_filled_from_inside(
    source, tmp_path, monkeypatch
):
  """The folder that a shell is in stays; another one ends what began there."""
  here = tmp_path / "here"
  here.mkdir()
  monkeypatch.chdir(here)
  number = here.stat().st_ino

  def kill(count):
    raise Stop

  with pytest.raises(Stop):
    run(source, pathlib.Path("."), progress=kill)
  monkeypatch.chdir(tmp_path)
  run(source, here)
  assert here.stat().st_ino == number
  assert sorted(p.name for p in here.iterdir()) == [
      "model.json", "report.json", "tokenizer", "trunk", "vq"]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "source"]


@pytest.mark.parametrize("name, keep, said", [
    ("model-00002-of-00003.safetensors", lambda name: "vision" in name,
     "all 3 files .* without model-00001-of-00003.safetensors, model-00003-of"),
    ("model.safetensors", lambda name: "layers.0" in name,
     r"missing tensors .*Download the files that are missing"),
    ("model.safetensors", lambda name: True, "without what is under 'ema'")])
def test_part_of_a_checkpoint_is_said_to_be_one(
    source, tmp_path, name, keep, said
):
  """Not that it is of another family; nor is a copy, that of another size."""
  arrays = {k: v for k, v in published(janus.recipe(tiny())).items() if keep(k)}
  if keep(""):
    arrays |= {f"ema.{k}": v for k, v in arrays.items()}
  for file in source.glob("model*"):
    file.unlink()
  write_safetensors(source / name, arrays)
  with pytest.raises(UserError, match=said):
    run(source, tmp_path / "out")


def test_a_mount_point_is_filled_from_inside(source, tmp_path, monkeypatch):
  """Nothing beside it is touched; killed while parts move up, it still ends,
  and model.json comes last."""
  out, rename, moved = tmp_path / "out", os.rename, []
  (out / "lost+found").mkdir(parents=True)
  monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out))

  def kill(a, b):
    assert not os.path.ismount(b)
    if pathlib.Path(b).parent == out:
      moved.append(pathlib.Path(b).name)
      if len(moved) == 3:
        raise Stop
    rename(a, b)

  monkeypatch.setattr(output_folder.os, "rename", kill)
  with pytest.raises(Stop):
    run(source, out)
  report = run(source, out)
  assert moved[-1] == "model.json"
  assert sorted(p.name for p in out.iterdir()) == [
      "lost+found", "model.json", "report.json", "tokenizer", "trunk", "vq"]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
  checkpoints.restore(out / "trunk")
  assert run(source, out) == report


def test_a_full_disk_is_noticed_first(source, tmp_path, monkeypatch):
  """Too little space is an error before anything is written."""
  usage = types.SimpleNamespace(free=100)
  monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda _: usage)
  with pytest.raises(UserError, match="MB free"):
    run(source, tmp_path / "out")
  assert not list(tmp_path.glob("*out*"))


def test_other_folders_are_left_alone(source, tmp_path):
  """A target with other content is an error."""
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "diary").write_text("dear")
  with pytest.raises(UserError, match="something else"):
    run(source, tmp_path / "out")


def test_the_diffusion_transformer_of_glm_image_is_one_line(tmp_path):
  """Its checkpoint in place of the autoregressive stage's is named."""
  write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", {
      "prior_token_embedding.weight": np.ones((2, 2), np.float32)})
  recipe = RECIPES["glm_image"](glm_image_config())
  with pytest.raises(UserError, match="GLM-Image's diffusion transformer"):
    convert.open_job(recipe, {"source": tmp_path}, "float32")
