"""train.mtp and train.drafter on a converted model, and generating with
them."""

import contextlib
import dataclasses
import io
import json
import shlex
import types

from absl import flags
import ml_collections
import numpy as np
from PIL import Image
import pytest

from ssd_jax.cli import common, config_overrides, generate, run, train
from ssd_jax.convert import convert
from ssd_jax.convert.checkpoint_files import Checkpoint
from ssd_jax.convert.registry import RECIPES
from ssd_jax.core.config import LoopConfig, OptimizerConfig, UserError
from ssd_jax.families import (
  anole,
  emoji,
  emu3,
  emu3_5,
  glm_image,
  janus,
  liquid,
  llamagen,
  lumina,
  lumina2,
  simplear,
)
from ssd_jax.models.spatial_heads import HeadsOptions
from ssd_jax.pipeline import model_folder
from ssd_jax.storage import checkpoints
from ssd_jax.storage.files import write_json
from ssd_jax.training import self_distillation
from ssd_jax.training.drafter import DrafterTraining
from ssd_jax.training.heads import MTPConfig
from ssd_jax.training.self_distillation import GenerationConfig
from tests.support import bad_inputs
from tests.support.made_pictures import captioned_folder, truncate
from tests.support.toy_families import llamagen_class_config
from tests.support.toy_weights import InMemory

GET_CONFIGS = tuple(family.get_config for family in (
    anole, emoji, emu3, emu3_5, glm_image, janus, liquid, llamagen, lumina,
    lumina2, simplear))


@pytest.fixture(scope="module", autouse=True)
def config_flag():
  if "config" not in flags.FLAGS:
    run.define_config()


def call(capsys, body, *args):
  """(exit status, stdout, stderr) of a command with these arguments."""
  flags.FLAGS.unparse_flags()
  for name in ("config", "workdir", "prompt", "out", "decoder", "json",
               "checkpoint", "heads", "drafter", "temperature"):
    flags.FLAGS[name].unparse()
  try:
    run.main(body, ["command", *map(str, args)])
    status = 0
  except SystemExit as error:
    status = error.code
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def write_config(file, steps=2, rate=1e-4, **changes):
  """A config file of the toy family, with short runs."""
  config = llamagen_class_config()
  config.images_per_caption = 1
  config.mtp.heads.update(horizontal=2, vertical=1)
  config.mtp.draw.update(batch=10, shard=10)
  for part in (config.mtp, config.drafter):
    part.loop.update(steps=steps, batch=4, save_every=1, eval_every=2)
    part.update(eval_images=4)
    part.optimizer.learning_rate = rate
  config.drafter.update(depth=2, redundancy=0.1)
  config.update(changes)
  file.write_text(
      "import json, ml_collections\n"
      "get_config = lambda: ml_collections.ConfigDict(json.loads(\n"
      f"    {config.to_json()!r}))\n")
  return f"--config={file}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The folder of a converted toy checkpoint."""
  recipe = RECIPES["llamagen"](llamagen_class_config())
  found = tuple(
      Checkpoint({s.name: InMemory(s.name, s.shape) for row in part.table.rows
                  for s in row.sources}, ()) for part in recipe.parts)
  out = tmp_path_factory.mktemp("toy") / "model"
  convert.convert(convert.Job(recipe, found, (), "float32"), out)
  return out


@pytest.mark.slow
def test_convert_train_generate(capsys, model, tmp_path, monkeypatch):
  """Both commands run on one set of images; their weights generate images."""
  config = write_config(tmp_path / "toy.py", checkpoint=str(model))
  args = (config, "--workdir", tmp_path / "run")
  status, out, err = call(capsys, train.mtp, *args)
  assert status == 0, err
  assert "| vertical | 1 |" in out and "--decoder ssd" in out
  monkeypatch.setattr(
    self_distillation, "_items", None
  )  # nothing drawn anew
  other = write_config(tmp_path / "b.py", rate=0.5, checkpoint=str(model))
  status, _, err = call(capsys, train.mtp, other, *args[1:])
  assert status == 2 and "got mtp.optimizer.learning_rate=0.5" in err
  longer = write_config(tmp_path / "c.py", steps=3, checkpoint=str(model))
  status, _, err = call(capsys, train.mtp, longer, *args[1:])
  assert status == 0, err
  status, out, err = call(capsys, train.drafter, *args)
  assert status == 0, err
  assert "Mean accepted length on 4 held-out images" in out
  assert "Mean accepted length" in (
      tmp_path / "run" / "drafter" / "acceptance.md").read_text()
  trained = tmp_path / "run" / "model"
  command = shlex.split(out.splitlines()[-1])
  assert command[:3] == ["python", "-m", "infer.generate"]
  status, _, err = call(  # as printed
      capsys, generate.body, *command[3:], "--out", tmp_path / "out")
  assert status == 0, err
  for decoder in ("ssd", "lantern:neighbours=5"):
    status, out, err = call(
        capsys, generate.body, "--checkpoint", model, "--heads",
        trained / "heads", "--drafter", trained / "drafter", "--decoder",
        decoder, "--prompt", "3", "--json", "--out", tmp_path / "out")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["passes"][0] <= 16


@pytest.mark.slow
def test_a_configs_sampling_reaches_the_images(capsys, model, tmp_path):
  """The file's settings and model are used; flags go before them."""
  config = write_config(
      tmp_path / "toy.py", checkpoint=str(model), sampling=dict(
          guidance=2.0, temperature=1.0, top_k=5, top_p=1.0))
  status, out, err = call(
      capsys, generate.body, config, "--temperature", 0.5, "--prompt", "3",
      "--json", "--out", tmp_path / "out")
  assert status == 0, err
  said = Image.open(json.loads(out.splitlines()[-1])["images"][0]).text
  assert (said["guidance"], said["temperature"], said["top_k"]) == (
      "2.0", "0.5", "5")


@pytest.mark.parametrize("decoder", ["eagle", "lantern", "ssd"])
def test_without_weights_a_decoder_says_what_trains_them(
    capsys, model, tmp_path, decoder
):
  """One line, nothing written."""
  status, _, err = call(
      capsys, generate.body, "--checkpoint", model, "--decoder", decoder,
      "--prompt", "3", "--out", tmp_path / "out")
  assert status == 2
  command = "train.mtp" if decoder == "ssd" else "train.drafter"
  assert command in err.splitlines()[-1]
  assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("changes, said", [
    (dict(checkpoint="nowhere"), "infer.convert --config configs/llamagen.py"),
    (dict(prompts_file="nowhere.txt"), "--config.prompts_file=FILE"),
    (dict(images_per_caption=0), "images_per_caption"),
])
def test_what_training_lacks_is_one_line(
    capsys, model, tmp_path, changes, said
):
  """A missing model or prompts file: how to get it."""
  changes = dict(checkpoint=str(model)) | changes
  config = write_config(tmp_path / "toy.py", **changes)
  for body in (train.mtp, train.drafter):
    status, _, err = call(
        capsys, body, config, "--workdir", tmp_path / "run")
    assert status == 2 and said in err.splitlines()[-1]
    assert "Expected " in err.splitlines()[-1]


def test_edited_captions_never_renumber_a_trunks_words(tmp_path, monkeypatch):
  """train.ar refuses other captions before it encodes or writes anything."""
  def encode_split(*_):
    raise UserError("encoded")

  monkeypatch.setattr(train.ar_training, "encode_split", encode_split)
  data = captioned_folder(tmp_path / "data", 5)
  checkpoints.save(tmp_path / "run" / "model" / "vq", {"w": np.zeros(1)})
  args = ["--config", "configs/emoji.py:smoke", "--config.pixels=8",
          f"--config.data=folder:{data}", "--workdir", f"{tmp_path}/run"]
  feed = lambda: bad_inputs.feed("ar", args, tmp_path)[1]
  assert feed().endswith("encoded\n")
  (tmp_path / "run" / "ar" / "checkpoints").mkdir()
  before = (tmp_path / "run" / "ar" / "data.npz").read_bytes()
  assert feed().endswith("encoded\n")
  (data / "03.txt").write_text("blue")
  assert "got another caption for '03' for the run in" in feed()
  assert (tmp_path / "run" / "ar" / "data.npz").read_bytes() == before
  truncate(data / "01.png")
  truncate(data / "02.png")
  error = feed()
  assert "got 2 images" in error and "01.png" in error and "02.png" in error


def test_prompts_and_parts_belong_to_a_run_of_heads(tmp_path, monkeypatch):
  """Edited prompts, another text tokenizer: one line; moved prompts go on."""
  def learn(*_):
    raise UserError("trained")

  parts = {"text tokenizer": "1"}
  monkeypatch.setattr(train.mtp_training, "run", learn)
  monkeypatch.setattr(
      train, "_teacher", lambda *_: types.SimpleNamespace(parts=parts))
  monkeypatch.setattr(train, "lossless_decoder", lambda *_: None)

  def feed(name, text):
    (tmp_path / name).write_text(text)
    return bad_inputs.feed(
        "mtp", ["--config.checkpoint=emoji", "--workdir", f"{tmp_path}/run",
                f"--config.prompts_file={tmp_path}/{name}"], tmp_path)[1]

  assert feed("a.txt", "red\nblue\ngreen") == "trained\n"
  (tmp_path / "run" / "mtp" / "checkpoints").mkdir()
  assert feed("b.csv", "prompt\nred\nblue\ngreen\n") == "trained\n"
  said = feed("a.txt", "red\nblue\ngrey")
  assert "got the new caption 'grey', 1 caption fewer for the run in" in said
  parts["text tokenizer"] = "2"
  assert "got another text tokenizer for" in feed("a.txt", "red\nblue\ngreen")


def lumina_512(folder):
  """A folder that says that it is Lumina of 512 px, and prompts."""
  config = lumina.get_config("512").to_dict()
  (folder / "prompts.txt").write_text("a\nb\n")
  write_json(folder / "model" / "model.json",
             {"family": "lumina", "config": config})
  return [f"--config.prompts_file={folder}/prompts.txt",
          f"--config.checkpoint={folder}/model"]


@pytest.mark.parametrize("variant", ["", ":768", ":1024"])
def test_a_checkpoint_of_another_variant_is_one_line(tmp_path, variant):
  """Heads are never trained for a grid of another checkpoint."""
  status, err, written = bad_inputs.feed(
      "mtp", ["--config", f"configs/lumina.py{variant}",
              *lumina_512(tmp_path)], tmp_path)
  assert status == 2 and not written
  assert f"target_size={variant[1:] or 768}, as --config" in err
  assert "with target_size=512" in err


@pytest.mark.parametrize("body", ["mtp", "drafter"])
@pytest.mark.parametrize("config", ["emoji.py:smoke", "janus_pro.py:1b"])
def test_a_checkpoint_of_another_family_is_one_line(tmp_path, body, config):
  """Before it is loaded; heads of one family are never trained for another."""
  status, err, written = bad_inputs.feed(
      body, ["--config", f"configs/{config}", *lumina_512(tmp_path)], tmp_path)
  assert status == 2 and not written
  assert "got --config of family" in err and "model of 'lumina'" in err


def test_a_variant_that_is_named_is_the_checkpoints(tmp_path):
  """Generation refuses the configs that training refuses."""
  lumina_512(tmp_path)
  status, err, _ = bad_inputs.feed(
      "generate", ["--config", "configs/lumina.py:768", "--prompt", "a",
                   "--checkpoint", f"{tmp_path}/model"], tmp_path)
  assert status == 2 and "target_size=768, as --config" in err


@pytest.mark.parametrize("args", [
    ["configs/lumina.py:512"],
    ["configs/lumina.py:512", "--config.size=1024x256"],
    ["configs/lumina.py", "--config.target_size=512", "--config.size=512x512"],
])
def test_training_and_drawing_choose_the_grid_by_one_rule(
    tmp_path, monkeypatch, args
):
  """And the command that training prints makes the same choices."""
  chosen, same = [], []
  config, *args = args

  def load(name, **given):
    chosen.append(given["choices"])
    raise UserError("loaded")

  def draw():
    common.load_pipeline()

  def learn():
    same.extend(config_overrides.flags_of(flags.FLAGS.config))
    train._teacher(flags.FLAGS.config, tmp_path)

  monkeypatch.setattr(model_folder, "load", load)
  checkpoint = lumina_512(tmp_path)[1:]
  for body in (learn, draw):
    _, err, _ = bad_inputs.feed(
        "generate", ["--config", config, *args, *checkpoint], tmp_path, body)
    assert err == "loaded\n"
  bad_inputs.feed("generate", [*same, *checkpoint], tmp_path, draw)
  assert chosen[0] == chosen[1] == chosen[2] and "size" in chosen[0]


def test_the_printed_command_is_for_a_shell(tmp_path):
  """Spaces and quotes of paths and captions are quoted."""
  table, out = tmp_path / "table.md", io.StringIO()
  table.write_text("")

  def body():
    with contextlib.redirect_stdout(out):
      train._print_table(
          flags.FLAGS.config, tmp_path / "a b", "heads", "ssd", table,
          {"validation": ["it's $5"]})

  bad_inputs.feed("generate", ["--config.checkpoint=my model"], tmp_path, body)
  words = shlex.split(out.getvalue().splitlines()[-1])
  assert words[3:] == [
      "--checkpoint", "my model", "--heads", f"{tmp_path}/a b/model/heads",
      "--decoder", "ssd", "--prompt", "it's $5"]


def test_settings_that_nothing_reads_are_refused(monkeypatch):
  """--config.trunk.d_model would change nothing when heads are trained."""
  changed = {"mtp.loop.steps": 2, "trunk.d_model": 8}
  monkeypatch.setattr(
      run.config_flags, "get_override_values", lambda flag: changed)
  run.refuse_unused("mtp", "trunk")
  with pytest.raises(UserError, match="got --config.trunk.d_model"):
    run.refuse_unused("mtp", "trun")


@pytest.mark.parametrize("get_config", GET_CONFIGS)
def test_every_setting_can_be_changed(get_config):
  """What the trainers know is spelled out in every family's config."""
  names = lambda cls: {f.name for f in dataclasses.fields(cls)}
  config = get_config()
  for part, cls in ((config.mtp, MTPConfig), (config.drafter, DrafterTraining)):
    assert set(part) == names(cls)
    assert set(part.loop) == names(LoopConfig)
    assert set(part.optimizer) == names(OptimizerConfig)
  assert set(config.mtp.heads) == names(HeadsOptions)
  assert set(config.mtp.draw) == names(GenerationConfig)
  assert isinstance(config.sampling, ml_collections.ConfigDict)
  for key in ("workdir", "checkpoint", "prompts_file", "num_prompts",
              "images_per_caption"):
    assert key in config


def test_a_part_of_the_captions_is_learnt_from():
  """num_prompts cuts what is trained on, and not what is held out."""
  config = emoji.get_config()
  whole = train._captions(config)
  config.num_prompts = 10
  assert train._captions(config) == {**whole, "train": whole["train"][:10]}
  config.num_prompts = -1
  with pytest.raises(
      UserError, match="Expected num_prompts to be >= 0.*, got num_prompts=-1"):
    train._captions(config)
