"""infer.generate: what it writes, what it says, how it fails."""

import json
import os

from absl import flags
import numpy as np
from PIL import Image
import pytest

from ssd_jax.cli import common, generate, run
from ssd_jax.core.config import UserError
from ssd_jax.core.outputs import Picture
from ssd_jax.pipeline import testing
from ssd_jax.visualization.album import Album


@pytest.fixture(scope="module", autouse=True)
def config_flag():
  if "config" not in flags.FLAGS:
    run.define_config()


def call(capsys, *args):
  """(exit status, stdout, stderr) of the command with these arguments."""
  flags.FLAGS.unparse_flags()
  for name in ("config", "prompt", "out", "decoder", "json", "trace",
               "checkpoint",
               "prompts_file", "num_images", "batch", "seed", "guidance",
               "temperature", "top_k", "top_p", "random_weights"):
    flags.FLAGS[name].unparse()
  try:
    run.main(generate.body, ["generate", *map(str, args)])
    status = 0
  except SystemExit as error:
    status = error.code
  captured = capsys.readouterr()
  return status, captured.out, captured.err


@pytest.mark.slow
def test_pictures_metadata_sheet_and_json(capsys, tmp_path):
  """PNGs with prompt, seed and settings; a sheet of several; one JSON line."""
  status, out, _ = call(
      capsys, "--prompt", "red heart", "--prompt", "漢字", "--json",
      "--out", tmp_path, "--guidance", 2, "--seed", 7)
  assert status == 0
  said = json.loads(out.splitlines()[-1])
  assert set(said) == {
      "decoder", "settings", "lossless", "prompts", "images", "contact_sheet",
      "cells", "passes", "tokens_per_pass", "compile_seconds", "seconds"}
  assert said["prompts"] == ["red heart", "漢字"] and said["cells"] == 256
  assert len(said["images"]) == len(said["passes"]) == 2
  picture = Image.open(said["images"][0])
  assert picture.size == (128, 128)
  assert picture.text["prompt"] == "red heart"
  assert picture.text["seed"] == "7" and picture.text["guidance"] == "2.0"
  assert Image.open(said["contact_sheet"]).size[0] > 256
  assert not [f for f in os.listdir(tmp_path) if "partial" in f]


def test_a_prompt_in_utf8_is_one_in_every_locale(monkeypatch):
  """Where Python takes arguments for ASCII, their bytes are still UTF-8."""
  monkeypatch.setattr(
      os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
  typed = [os.fsencode("red").decode(), "caf\udcc3\udca9", "\u4e2d"]
  assert generate.read_prompts(typed, None) == ["red", "caf\xe9", "\u4e2d"]
  with pytest.raises(UserError, match="a prompt in UTF-8"):
    generate.read_prompts(["caf\udce9"], None)


def test_thousands_of_images_are_written_as_they_come(tmp_path):
  """In any order, without staying in memory; the sheet holds the first."""
  album = Album(tmp_path, {"seed": 1})
  for index in reversed(range(70)):
    image = np.full((2, 3, 3), index, np.uint8)
    album.add(Picture(index, f"p{index}", image, None, index + 1, None))
    assert len(list(tmp_path.glob("*.png"))) == 70 - index
  album.close()
  assert 63 in np.asarray(Image.open(album.sheet))
  assert album.passes == list(range(1, 71)) and album.prompts[69] == "p69"
  assert [p.name for p in album.paths[:2]] == ["0000_p0.png", "0001_p1.png"]
  assert len(album.notes) == 1 and "first 64" in album.notes[0]
  later = Album(tmp_path, {"seed": 1})
  later.add(Picture(0, "p0", np.zeros((2, 3, 3), np.uint8), None, 1, None))
  later.close()
  assert "also holds 69 images" in later.notes[0]
  assert later.sheet is None and not album.sheet.exists()
  assert np.asarray(Image.open(album.paths[69])).max() == 69


@pytest.mark.slow
def test_same_seed_same_bytes(capsys, tmp_path):
  """Two runs write the same files, byte for byte."""
  for name in ("a", "b"):
    status, _, _ = call(
        capsys, "--prompt", "red heart", "--out", tmp_path / name)
    assert status == 0
  a, b = (next((tmp_path / n).glob("*.png")).read_bytes() for n in "ab")
  assert a == b


@pytest.mark.slow
def test_an_image_is_completed(capsys, tmp_path):
  """--complete keeps the upper rows of a file, whatever the prompt."""
  heart = tmp_path / "heart.png"
  image = Image.new("RGB", (256, 192), "white")
  image.paste("red", (64, 0, 192, 192))
  image.save(heart)
  status, _, _ = call(
      capsys, "--prompt", "blue fish", "--decoder", "ar", "--complete", heart,
      "--rows", "14", "--out", tmp_path / "out")
  drawn = np.asarray(
      Image.open(next((tmp_path / "out").glob("*.png"))).convert("RGB"), int)
  assert status == 0
  middle, edge = drawn[16:80, 48:80].mean((0, 1)), drawn[16:80, :8].mean((0, 1))
  assert middle[0] > 180 > 80 > middle[1] and edge.min() > 220


@pytest.mark.slow
def test_long_prompt_generates_and_notes_that_it_was_cut(capsys, tmp_path):
  """10,000 characters generate something, with a note."""
  status, out, _ = call(capsys, "--prompt", "cat " * 2500, "--out", tmp_path)
  assert status == 0 and "note:" in out and list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("args,named", [
    ([], "prompt"),
    (["--prompt", ""], "prompt"),
    (["--prompt", "\x00\x07 \n"], "prompt"),
    (["--prompt", "x" * 10_001], "10001"),
    (["--prompt", "a", "--num_images", "0"], "num_images"),
    (["--prompt", "a", "--batch", "-1"], "batch"),
    (["--prompt", "a", "--seed", "-1"], "seed"),
    (["--prompt", "a", "--temperature", "-1"], "temperature"),
    (["--prompt", "a", "--top_p", "2"], "top_p"),
    (["--prompt", "a", "--guidance", "nan"], "guidance"),
    (["--prompt", "a", "--top_k", "x"], "top_k"),
    (["--prompt", "a", "--decoder", "arr"], "arr"),
    (["--prompt", "a", "--decoder", "ar:x=1"], "x=1"),
    (["--prompt", "a", "--checkpoint", "/nowhere"], "/nowhere"),
    (["--prompts_file", "/nowhere"], "/nowhere"),
    (["--prompt", "a", "--colour", "red"], "colour"),
    (["--prompt", "a", "--config", "/nowhere.py"], "/nowhere.py"),
    (["--prompt", "a", "stray"], "stray"),
])
def test_mistakes_end_in_one_line(capsys, tmp_path, args, named):
  """Exit status 2, one line that names the culprit, nothing written."""
  out = tmp_path / "out"
  status, _, err = call(capsys, *args, "--out", out)
  lines = [x for x in err.splitlines() if x.strip() and "image/s" not in x]
  assert status == 2
  assert named in lines[-1] and "Expected " in lines[-1]
  assert "Traceback" not in err
  assert not out.exists() or not list(out.iterdir())


def test_out_that_is_a_file(capsys, tmp_path):
  """--out that is a file ends in one line; the file is left alone."""
  path = tmp_path / "file"
  path.write_text("mine")
  status, _, err = call(capsys, "--prompt", "a", "--out", path)
  assert status == 2 and str(path) in err.splitlines()[-1]
  assert path.read_text() == "mine"


def test_damaged_checkpoint(capsys, tmp_path):
  """A truncated file of a model ends in one line that names the folder."""
  import shutil

  from ssd_jax.pipeline.model_folder import EMBEDDED

  model = tmp_path / "model"
  shutil.copytree(EMBEDDED, model)
  largest = max((f for f in (model / "trunk").rglob("*") if f.is_file()),
                key=lambda f: f.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:1000])
  status, _, err = call(capsys, "--prompt", "a", "--checkpoint", model,
                        "--out", tmp_path / "out")
  assert status == 2 and "damaged" in err.splitlines()[-1]
  assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.slow
def test_generate_writes_traces_and_a_race(monkeypatch, capsys, tmp_path):
  """--trace adds animations, heat maps and AR beside the decoder."""
  pipe = testing.tiny(vocab=5, rows=3, cols=4, heads=(0, 0))
  monkeypatch.setattr(common, "load_pipeline", lambda **_: pipe)
  monkeypatch.setattr(run, "use_compilation_cache", lambda: None)
  if "config" not in flags.FLAGS:
    run.define_config()
  flags.FLAGS.unparse_flags()
  for module in (generate, common):
    for flag in flags.FLAGS.get_key_flags_for_module(module):
      flag.unparse()
  run.main(generate.body, [
      "generate", "--prompt", "a", "--prompt", "b", "--trace", "--json",
      "--decoder", "sjd:window=4", "--out", str(tmp_path)])
  said = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert sorted(said["images"]) == [
      str(tmp_path / "0000_a.png"), str(tmp_path / "0001_b.png")]
  for stem in ("0000_a", "0001_b"):
    assert Image.open(tmp_path / f"{stem}_passes.png").size[0] == 8
    with Image.open(tmp_path / f"{stem}_filling.gif") as gif:
      assert gif.n_frames > 2
    assert list((tmp_path / f"{stem}_filling").glob("*.png"))
  assert Image.open(tmp_path / "beside_ar.gif").size[0] > 16
  assert not list(tmp_path.rglob("*.partial"))
