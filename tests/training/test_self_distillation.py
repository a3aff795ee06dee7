"""Self-distillation: images generated in shards, resumed, never repeated."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.pipeline import testing
from ssd_jax.training import image_shards, self_distillation
from ssd_jax.training.self_distillation import GenerationConfig, Teacher
from tests.support import ROOT, tiny_training as tiny


def test_a_removed_shard_is_generated_again(tmp_path):
  """The same images; the other shards are not touched."""
  teacher, cfg = tiny.teacher(), GenerationConfig(batch=2, shard=2)
  before = self_distillation.generate_images(
    teacher, list("abcdef"), cfg, tmp_path
  ).tokens
  shards = sorted(tmp_path.glob("*.npz"))
  written = [path.stat().st_mtime_ns for path in shards]
  shards[1].unlink()
  again = self_distillation.generate_images(
    teacher, list("abcdef"), cfg, tmp_path
  ).tokens
  np.testing.assert_array_equal(before, again)
  now = [path.stat().st_mtime_ns for path in shards]
  assert now[::2] == written[::2] and now[1] != written[1]


CAPTIONS = tuple("abcdefghijk")
DRAW = GenerationConfig(batch=3, shard=4, seed=5)


def make_pipe():
  pipe = testing.tiny(vocab=5, rows=3, cols=3, end_of_row=True, guidance=2.0,
                      heads=(0, 0))
  return dataclasses.replace(  # as loaded without heads and drafter
      pipe, params={"trunk": pipe.params["trunk"]},
      model=pipe.family.generator.model())


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Runs of one teacher share their programs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Teacher, "programs", functools.cache(Teacher.programs))
    yield


def make_teacher(pipe):
  return Teacher.of(pipe)


@pytest.fixture(scope="module")
def pipe():
  return make_pipe()


@pytest.fixture(scope="module")
def teacher(pipe):
  return make_teacher(pipe)


@pytest.fixture(scope="module")
def drawn(teacher, tmp_path_factory):
  return self_distillation.generate_images(
    teacher, CAPTIONS, DRAW, tmp_path_factory.mktemp("all")
  )


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["exact", "ar"])
def test_images_are_those_of_the_decoder(
    pipe, teacher, drawn, tmp_path, decoder
):
  """Stage one stores what generate() generates for the same seed, in codes,
  whichever images shared a batch."""
  if decoder != DRAW.decoder:
    drawn = self_distillation.generate_images(
        teacher, CAPTIONS, dataclasses.replace(DRAW, decoder=decoder), tmp_path)
  out = pipe.generate(list(CAPTIONS), decoder, seed=5, batch=11)
  np.testing.assert_array_equal(drawn.tokens, out.tokens.reshape(11, -1))
  assert drawn.tokens.dtype == np.uint8
  np.testing.assert_array_equal(
      drawn.sequences(np.arange(11)), pipe.sequence(out.tokens)
  )


@pytest.mark.parametrize("decoder, said", [
    ("ssd", "lossless"), ("stair", "lossless"), ("eagle", "needs no drafter"),
    ("exact:drafts=heads", "needs no heads")])
def test_only_lossless_decoders_that_can_run_generate(
    teacher, tmp_path, decoder, said
):
  """Heads learn from samples of the model's own distribution."""
  cfg = dataclasses.replace(DRAW, decoder=decoder)
  with pytest.raises(UserError, match=f"draw.decoder to be .*{said}"):
    self_distillation.generate_images(teacher, CAPTIONS, cfg, tmp_path / "no")
  assert not (tmp_path / "no").exists()


def test_a_folder_goes_on_with_its_own_decoder(
    teacher, tmp_path, monkeypatch, capsys
):
  """Manifests of before name none: theirs was ar; another one is refused."""
  used = []
  monkeypatch.setattr(self_distillation, "_decode", lambda run, *args: (
      used.append(run), iter(()))[1])
  monkeypatch.setattr(image_shards, "read", lambda path, images, *_: (
      np.zeros((len(images), 9), np.uint8)))
  draw = lambda cfg: self_distillation.generate_images(
      teacher, CAPTIONS, cfg, tmp_path)
  draw(DRAW)
  with pytest.raises(UserError, match="whose decoder differs"):
    draw(dataclasses.replace(DRAW, decoder="ar"))
  path = tmp_path / "manifest.json"
  manifest = json.loads(path.read_text())
  assert manifest.pop("decoder") == "exact"
  path.write_text(json.dumps(manifest))
  draw(DRAW)
  assert [run.decoder.name for run in used] == ["exact", "ar"]
  assert "was begun with ar" in capsys.readouterr().err


def draw_until_killed(folder):
  """Generates into a folder; dies by SIGKILL while it writes the second
  shard."""
  real, calls = self_distillation.os.replace, []

  def replace(partial, path):
    if pathlib.Path(path).name.startswith("tokens-00001"):
      os.kill(os.getpid(), signal.SIGKILL)
    calls.append(real(partial, path))

  self_distillation.os.replace = replace
  self_distillation.generate_images(
    make_teacher(make_pipe()), CAPTIONS, DRAW, folder
  )


@pytest.mark.slow
def test_a_killed_generation_loses_and_repeats_nothing(
    teacher, drawn, tmp_path, monkeypatch
):
  """Killed before the second shard's rename and restarted: the same images."""
  child = subprocess.run(
      [sys.executable, "-c",
       "from tests.training import test_self_distillation as here; "
       f"here.draw_until_killed({str(tmp_path)!r})"],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      capture_output=True)
  assert child.returncode == -signal.SIGKILL, child.stderr
  assert [f.name for f in tmp_path.glob("*.npz")] == [
      "tokens-00000-of-00003.npz"]
  real, begun = self_distillation._items, []
  monkeypatch.setattr(
      self_distillation, "_items",
      lambda *args: (begun.extend(args[2]), real(*args))[1])
  again = self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)
  np.testing.assert_array_equal(again.tokens, drawn.tokens)
  assert begun == list(range(4, 11))  # the first shard was not drawn again
  assert not list(tmp_path.glob(".*"))


def test_a_kill_between_write_and_rename_is_harmless(
    teacher, drawn, tmp_path, monkeypatch
):
  """What was not renamed is not read."""
  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(self_distillation.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)
  again = self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)
  np.testing.assert_array_equal(again.tokens, drawn.tokens)


def test_images_of_other_settings_are_refused(teacher, drawn, tmp_path):
  """Captions, seed and sampling are in the manifest; damage is named."""
  del drawn
  self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)
  with pytest.raises(UserError, match="whose captions differs"):
    self_distillation.generate_images(teacher, CAPTIONS[::-1], DRAW, tmp_path)
  with pytest.raises(UserError, match="whose seed differs"):
    self_distillation.generate_images(
        teacher, CAPTIONS, dataclasses.replace(DRAW, seed=6), tmp_path)
  hotter = dataclasses.replace(teacher, guided=False)
  with pytest.raises(UserError, match="whose sampling differs"):
    self_distillation.generate_images(hotter, CAPTIONS, DRAW, tmp_path)
  with_parts = dataclasses.replace(teacher, parts={"text tokenizer": "1"})
  self_distillation.generate_images(with_parts, CAPTIONS, DRAW, tmp_path)
  (tmp_path / "manifest.json").unlink()
  self_distillation.generate_images(with_parts, CAPTIONS, DRAW, tmp_path)
  with pytest.raises(UserError, match="whose text tokenizer differs"):
    self_distillation.generate_images(
        dataclasses.replace(teacher, parts={"text tokenizer": "2"}), CAPTIONS,
        DRAW, tmp_path)
  next(tmp_path.glob("tokens-00001*")).write_bytes(b"half")
  with pytest.raises(UserError, match="damaged.*tokens-00001"):
    self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)


def test_damaged_shards_are_never_trained_on(teacher, drawn, tmp_path):
  """Cut, flipped or swapped, a shard is named; one of older form is read."""
  draw = lambda: self_distillation.generate_images(
      teacher, CAPTIONS, DRAW, tmp_path)
  draw()
  first, second = sorted(tmp_path.glob("*.npz"))[:2]
  whole, other = first.read_bytes(), second.read_bytes()
  at = whole.index(drawn.tokens[:4].tobytes())
  flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
  for damaged in (b"", whole[:90], flipped, other):
    first.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged.*tokens-00000"):
      draw()
  first.unlink()
  older = first.with_suffix(".npy")
  np.save(older, drawn.tokens[:4])
  np.testing.assert_array_equal(draw().tokens, drawn.tokens)
  for wrong in (b"", np.full((4, 9), 5, np.uint8), np.zeros((4, 9))):
    if isinstance(wrong, bytes):
      older.write_bytes(wrong)
    else:
      np.save(older, wrong)
    with pytest.raises(UserError, match="damaged.*tokens-00000"):
      draw()


@pytest.mark.parametrize("text", [
    "", "[]", "3", "{", '{"grid": 3}', '{"trunk": ["a"]}', "null"])
def test_a_damaged_manifest_is_one_line(teacher, tmp_path, text):
  """Nothing is read as images of this run on the word of such a file."""
  (tmp_path / "manifest.json").write_text(text)
  with pytest.raises(UserError, match="Expected ") as error:
    self_distillation.generate_images(teacher, CAPTIONS, DRAW, tmp_path)
  assert "\n" not in str(error.value)


def test_dropped_captions_are_the_unconditional_stream(teacher, drawn):
  """Rows hold the image's caption or, at the given rate, the empty one."""
  stream = iter(
    self_distillation.batches(drawn, teacher, 8, 0, drop_caption=0.5)
  )
  prompt_of = {}
  for image, text in enumerate(CAPTIONS):
    both, _ = teacher.encode_prompts([text], True)
    prompt_of[image] = np.asarray(both.tokens)
  dropped = total = 0
  sequences = drawn.sequences(np.arange(len(drawn)))
  for _ in range(20):
    batch = next(stream)
    rows = np.asarray(batch["prompt"].tokens)
    for row, tokens in zip(rows, batch["tokens"], strict=True):
      images = np.flatnonzero((sequences == tokens).all(-1))
      is_cond = any((prompt_of[i][0] == row).all() for i in images)
      is_uncond = (prompt_of[images[0]][1] == row).all()
      assert is_cond or is_uncond
      dropped, total = dropped + is_uncond, total + 1
  assert abs(dropped / total - 0.5) < 0.15
