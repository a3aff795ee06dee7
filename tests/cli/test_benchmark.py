"""infer.benchmark: tables, plots and JSON it writes, and how it fails."""

import functools
import json
import sys

from absl import flags
import numpy as np
from PIL import Image
import pytest

from ssd_jax.cli import benchmark as command, common, run as cli
from ssd_jax.evaluation import benchmark, efficientnet, metrics
from ssd_jax.pipeline import testing
from ssd_jax.runtime import progress

ROW = {
    "decoder", "settings", "seed", "lossless", "passes", "pass_ratio",
    "queries", "seconds", "latency_ratio", "nll", "nll_gap",
    "nll_gap_interval", "excess", "excess_error", "fd", "kid", "recall_at_1",
    "recall_at_10", "fid", "clip", "within_ar_spread", "images"}


@functools.cache
def tiny():
  return testing.tiny(vocab=5, rows=3, cols=4, heads=(0, 0), guidance=2.0)


def call(capsys, *args):
  """(exit status, stdout, stderr) of the command with these arguments."""
  if "config" not in flags.FLAGS:
    cli.define_config()
  flags.FLAGS.unparse_flags()
  for module in (command, common):
    for flag in flags.FLAGS.get_key_flags_for_module(module):
      flag.unparse()
  status = 0
  try:
    cli.main(command.body, ["benchmark", *map(str, args)])
  except SystemExit as error:
    status = error.code
  captured = capsys.readouterr()
  return status, captured.out, captured.err


@pytest.fixture
def on_tiny(monkeypatch):
  """The command generates with the tiny pipeline and keeps no programs."""
  monkeypatch.setattr(common, "load_pipeline", tiny)
  monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
  monkeypatch.setattr(efficientnet, "available", lambda: False)


@pytest.mark.slow
def test_the_command_without_features(on_tiny, capsys, monkeypatch, tmp_path):
  """AR against itself: ratio 1, a gap inside its interval, one line on FD."""
  monkeypatch.setattr(progress.Bar, "MINUTE", 0.0)  # a line each time
  arguments = ("--decoders", "ar,ar:seed=1", "--num_prompts", 18, "--batch", 6,
               "--out", tmp_path)
  status, out, err = call(capsys, *arguments)
  assert status == 0 and "36/36" in err
  assert [x for x in out.splitlines() if "ssd-jax[bench]" in x] == [
      "no FD, KID and R@k: run pip install 'ssd-jax[bench]'"]
  results = json.loads((tmp_path / "results.json").read_text())
  assert set(results) == {"device", "config", "versions", "rows"}
  first, second = results["rows"]
  assert set(first) == set(second) == ROW
  assert first["pass_ratio"] == second["pass_ratio"] == 1.0
  assert second["seed"] == 1 and second["images"] == 18
  low, high = second["nll_gap_interval"]
  assert low < 0 < high and low < second["nll_gap"] < high
  assert second["within_ar_spread"] is True and first["fd"] is None
  table = (tmp_path / "table.md").read_text()
  assert table in out and "**AR's own spread**, ar:seed=1 against ar" in table
  assert results["config"]["guidance"] == 2.0
  for name in ("sheet_000.png", "sheet_001.png", "pareto.png"):
    assert Image.open(tmp_path / name).size[0] > 100
  assert json.loads((tmp_path / "details.json").read_text())["rows"]
  # Started again, everything is at hand; fewer prompts leave fewer sheets.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(benchmark, "measure", None)
    assert call(capsys, *arguments)[0] == 0
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert call(capsys, *arguments, "--num_prompts", 6)[0] == 0
  assert not (tmp_path / "sheet_001.png").exists()


@pytest.mark.slow
def test_greedy_runs_are_all_alike(on_tiny, capsys, tmp_path):
  """Without any spread there is a table and a plot all the same."""
  status, out, _ = call(
      capsys, "--decoders", "ar,ar:seed=1", "--num_prompts", 3, "--batch", 3,
      "--temperature", 0, "--out", tmp_path)
  assert status == 0 and "| ar:seed=1 |" in out
  assert (tmp_path / "pareto.png").exists()


@pytest.mark.slow
def test_an_edited_decoder_generates_anew(on_tiny, capsys, tmp_path):
  """What a user's file says is part of what a shard depends on."""
  file = tmp_path / "mine.py"
  text = ("import dataclasses\nfrom ssd_jax import SJD\n\n"
          "@dataclasses.dataclass(frozen=True)\nclass Mine(SJD):\n"
          "  name = 'mine'\n\n  def scratch(self, model):\n"
          "    return 0  # {}\n")
  arguments = ("--decoders", "mine:window=4", "--decoder_file", file,
               "--num_prompts", 2, "--batch", 2, "--out", tmp_path / "out")
  for number in (0, 1):
    file.write_text(text.format(number))
    assert call(capsys, *arguments)[0] == 0
  assert len(list((tmp_path / "out" / "shards").iterdir())) == 2


def test_the_command_with_features_and_export(
    on_tiny, monkeypatch, capsys, tmp_path):
  """Distances and recall are filled in; images are exported for scorers."""
  monkeypatch.setattr(efficientnet, "available", lambda: True)
  monkeypatch.setattr(
      efficientnet, "image_features",
      lambda images: np.float32(images[:].reshape(len(images), -1)[:, :9]))
  gallery = np.random.default_rng(0).normal(size=(1852, 9))
  monkeypatch.setattr(metrics, "emoji_gallery", lambda *args: gallery)
  status, out, _ = call(
      capsys, "--decoders", "ar", "--num_prompts", 3, "--num_images", 4,
      "--batch", 4, "--export", "dpg", "--out", tmp_path)
  assert status == 0
  (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert row["fd"] > 0 and row["kid"] is not None
  assert 0 <= row["recall_at_1"] <= row["recall_at_10"] <= 1
  assert row["images"] == 12 and row["within_ar_spread"] is None
  grid = Image.open(tmp_path / "dpg" / "ar" / "00002.png")
  assert grid.size == (16, 12)


@pytest.mark.parametrize("args,named", [
    (["--decoders", "arr"], "arr"), (["--num_prompts", "0"], "num_prompts"),
    (["--decoders", ""], "decoder"), (["--decoders", "ar,,sjd"], "decoder"),
    (["--decoders", "sjd:widow=3"], "widow"),
    (["--real_images", "/nowhere"], "/nowhere"),
    (["--split", "test"], "split"), (["--batch", "0"], "batch"),
    (["--decoders", "ar", "--export", "geneval"], "geneval"),
    (["--decoders", "ar", "--export", "dpg"], "num_images"),
    (["--prompts_file", "/nowhere"], "/nowhere"), (["--seed", "-1"], "seed"),
    (["--decoders", "ssd"], "head"), (["--top_p", "2"], "top_p"),
    (["--exactness", "--draws", "3"], "draws"),
    (["--exactness", "--guidance", "3"], "--guidance"),
    (["--top_k", "99999999999"], "top_k"), (["--guidance", "1e38"], "guidance"),
])
def test_mistakes_end_in_one_line(on_tiny, capsys, tmp_path, args, named):
  """Exit status 2, one line that names the culprit, nothing written."""
  out = tmp_path / "out"
  status, _, err = call(capsys, *args, "--out", out)
  assert status == 2
  assert named in err.splitlines()[-1] and "Expected " in err.splitlines()[-1]
  assert "Traceback" not in err and not list(out.rglob("*.json"))


def test_a_missing_extra_is_reported_before_any_work(
    on_tiny, monkeypatch, capsys, tmp_path):
  """Nothing is generated when the networks asked for are not at hand."""
  monkeypatch.setitem(sys.modules, "torchmetrics", None)
  monkeypatch.setitem(sys.modules, "torch", None)
  status, _, err = call(capsys, "--hub_metrics", "--out", tmp_path / "out")
  assert status == 2 and "ssd-jax[metrics]" in err.splitlines()[-1]
  assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(on_tiny, capsys, tmp_path):
  """A file in the way ends in one line, whether at the top or below."""
  (tmp_path / "file").write_bytes(b"")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "shards").write_bytes(b"")
  for name in ("file", "out"):
    status, _, err = call(
        capsys, "--decoders", "ar", "--num_prompts", 1, "--out",
        tmp_path / name)
    assert status == 2 and f"got {'--out' if name == 'file' else ''}" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_exactness_prints_its_table(on_tiny, monkeypatch, capsys, tmp_path):
  """The exactness test's verdicts, alone and in groups, on paper and in
  JSON."""
  grid = testing.tiny(vocab=3, rows=2, cols=2, heads=(0, 0))
  monkeypatch.setattr(testing, "tiny", lambda **kwargs: grid)
  status, out, _ = call(capsys, "--exactness", "--decoders", "ar",
                        "--draws", 4000, "--out", tmp_path)
  assert status == 0 and out.count("| exact |") == 2
  assert (tmp_path / "exactness.md").read_text() in out
  rows = json.loads((tmp_path / "exactness.json").read_text())["rows"]
  assert [(r["label"], r["group"], r["verdict"]) for r in rows] == [
      ("ar", 1, "exact"), ("ar", 4, "exact"), ("control", 1, "BIASED")]
  assert "not caught" not in out
