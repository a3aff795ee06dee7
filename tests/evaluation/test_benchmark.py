"""infer.benchmark: what it measures, keeps, compares and writes."""

import dataclasses
import functools
import json
import sys

from absl import flags
import numpy as np
from PIL import Image
import pytest

from ssd_jax.cli import benchmark as command, common, run as cli
from ssd_jax.core.config import UserError
from ssd_jax.data.sources import EmojiSource
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.jacobi.sjd import SJD
from ssd_jax.decoding.rows.zipar import ZipAR
from ssd_jax.evaluation import benchmark, efficientnet, metrics, quality, report
from ssd_jax.evaluation.benchmark import Entry, Job, Run, Traits
from ssd_jax.evaluation.metrics import Estimate, Gap
from ssd_jax.evaluation.quality import Quality, References
from ssd_jax.pipeline import testing
from ssd_jax.runtime import progress

ROW = {
    "decoder", "settings", "seed", "lossless", "passes", "pass_ratio",
    "queries", "seconds", "latency_ratio", "nll", "nll_gap",
    "nll_gap_interval", "excess", "excess_error", "fd", "kid", "recall_at_1",
    "recall_at_10", "fid", "clip", "within_ar_spread", "images"}
PROMPTS = ("red heart", "cat", "no emoji", "dog", "x")


@functools.cache
def tiny():
  return testing.tiny(vocab=5, rows=3, cols=4, heads=(0, 0), guidance=2.0)


def entries(text="ar,sjd:window=4,ar:seed=1"):
  return benchmark.parse_entries(text, seed=0)


def fake_run(images=4, **changes):
  """A run of made-up figures."""
  values = dict(
      images=np.zeros((images, 4, 4, 3), np.uint8),
      tokens=np.zeros((images, 2, 3), np.int32),
      passes=np.full(images, 3), commit_pass=np.ones((images, 2, 3), int),
      seconds=np.full(images, 0.5), nll=np.arange(images) / 4.0,
      entropy=np.zeros(images), memory=np.full(images, -1),
      session=np.zeros(images, int))
  return Run(**{**values, **changes})


def test_decoders_are_parsed_with_seeds():
  """Commas part decoders; seed= is the run's, all else the decoder's."""
  first, second, third = entries(
      "ar, sjd:window=4+seed=7+init=random,ar:seed=1")
  assert first == Entry("ar", AR(), 0)
  assert second.decoder == SJD(4) and second.seed == 7
  assert (third.label, third.decoder, third.seed) == ("ar:seed=1", AR(), 1)


@pytest.mark.parametrize("text,named", [
    ("ar,ar", "twice"), ("ar,ar:seed=0", "twice"), ("ar:seed=x", "seed=x"),
    ("ar:seed=-1", "seed=-1"), ("are", "are"), ("ar,", "''"),
    ("sjd:windows=3", "windows"),
])
def test_bad_decoders_end_in_one_line(text, named):
  """What cannot be run is told before any work."""
  with pytest.raises(UserError, match="got .*expected") as error:
    benchmark.parse_entries(text, 0)
  assert named in str(error.value) and "\n" not in str(error.value)


def test_surprisal_is_the_joint_law_without_filters():
  """Summed over cells it is -log p; filters do not enter; batches neither."""
  pipe = tiny()
  out = pipe.generate(PROMPTS[:3], batch=3)
  nll, entropy = pipe.nll(out.tokens, PROMPTS[:3], batch=2)
  np.testing.assert_allclose(
      nll.sum((1, 2)), -pipe.log_prob(out.tokens, PROMPTS[:3]), rtol=1e-4)
  assert (entropy >= 0).all() and (entropy <= np.log(5) + 1e-5).all()
  filtered, _ = pipe.nll(out.tokens, PROMPTS[:3], top_k=1, top_p=0.5)
  np.testing.assert_allclose(filtered, nll, atol=1e-5)
  other, _ = pipe.nll(out.tokens, PROMPTS[:3], guidance=1.0)
  assert np.abs(other - nll).max() > 0.1
  np.testing.assert_array_equal(pipe.decode_images(out.tokens, 2), out.images)


def test_excess_of_ar_is_zero():
  """Surprisal minus entropy of AR's own samples vanishes within its error."""
  pipe = tiny()
  texts = [PROMPTS[0]] * 400
  out = pipe.generate(texts, batch=400)
  nll, entropy = pipe.nll(out.tokens, texts, batch=400)
  flat = lambda x: x.reshape(len(x), -1)
  excess = metrics.excess(flat(nll), flat(entropy))
  assert abs(excess.value) < 4 * excess.error < 0.2


def test_traits_are_known_without_running():
  """AR feeds one slot per pass, a Jacobi window its size."""
  job = Job(PROMPTS)
  traits = lambda decoder: benchmark.traits(tiny(), decoder, job)
  assert traits(AR()) == Traits(1, True)
  assert traits(SJD(4)) == Traits(4, True)
  assert traits(ZipAR(2)).is_lossless is False


def test_runs_are_what_generate_draws(tmp_path):
  """Batches, the last one not full, join to one call's pictures."""
  pipe, job = tiny(), Job(PROMPTS, num_images=1, batch=2)
  runs = benchmark.run(pipe, entries(), job, tmp_path)
  for entry, run in zip(entries(), runs, strict=True):
    out = pipe.generate(PROMPTS, entry.decoder, seed=entry.seed, batch=5)
    np.testing.assert_array_equal(run.tokens, out.tokens)
    np.testing.assert_array_equal(run.images[:], out.images)
    np.testing.assert_array_equal(run.images[4], out.images[4])
    np.testing.assert_array_equal(run.passes, out.passes)
    nll, entropy = pipe.nll(out.tokens, PROMPTS)
    np.testing.assert_allclose(run.nll, nll.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(run.entropy, entropy.mean((1, 2)), atol=1e-5)
    assert (run.seconds > 0).all() and (run.memory > 0).all()
  assert (runs[1].passes < 12).any() and (runs[0].passes == 12).all()


@pytest.fixture
def measured(monkeypatch):
  """Replaces drawing by a note of (decoder, first image)."""
  calls = []

  def measure(pipe, entry, job, start):
    calls.append((entry.label, start))
    size = min(job.batch, len(job.texts) - start)
    return fake_run(size, nll=np.full(size, float(start)))

  monkeypatch.setattr(benchmark, "measure", measure)
  monkeypatch.setattr(benchmark, "_draw", lambda *args: None)
  return calls


def test_decoders_are_interleaved(measured, tmp_path):
  """Each batch is drawn by all before the next, in turning order."""
  benchmark.run(tiny(), entries(), Job(PROMPTS, batch=2), tmp_path)
  assert [start for _, start in measured] == [0] * 3 + [2] * 3 + [4] * 3
  orders = [[label for label, _ in measured[i:i + 3]] for i in (0, 3, 6)]
  labels = [e.label for e in entries()]
  assert orders == [labels, labels[1:] + labels[:1], labels[2:] + labels[:2]]


def test_an_interrupted_run_goes_on(measured, tmp_path, monkeypatch):
  """What was finished is not drawn again; what comes out is the same."""
  job = Job(PROMPTS, batch=2)
  whole = benchmark.run(tiny(), entries(), job, tmp_path / "whole")
  measured.clear()
  real = benchmark.measure

  def stop(pipe, entry, job, start):
    if len(measured) == 4:
      raise KeyboardInterrupt
    return real(pipe, entry, job, start)

  with monkeypatch.context() as patch:
    patch.setattr(benchmark, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
      benchmark.run(tiny(), entries(), job, tmp_path / "broken")
  again = benchmark.run(tiny(), entries(), job, tmp_path / "broken")
  assert len(measured) == len(set(measured)) == 9
  for a, b in zip(whole, again, strict=True):
    for field in dataclasses.fields(Run):
      np.testing.assert_array_equal(
          getattr(a, field.name)[:], getattr(b, field.name)[:])


def test_shards_are_used_again_only_for_the_same_question(measured, tmp_path):
  """More prompts keep what is done; any other change draws anew."""
  pipe, job = tiny(), Job(PROMPTS[:2])
  count = lambda *args: (
      measured.clear() or benchmark.run(*args, tmp_path) and len(measured))
  assert count(pipe, entries("ar"), job) == 2
  assert count(pipe, entries("ar"), job) == 0
  assert count(pipe, entries("ar"), Job(PROMPTS)) == 3
  assert count(pipe, entries("ar:seed=1"), job) == 2
  assert count(pipe, entries("sjd"), job) == 2
  assert count(pipe, entries("sjd:window=3"), job) == 2
  assert count(pipe, entries("ar"), dataclasses.replace(job, batch=2)) == 1
  warm = dataclasses.replace(job, sampling={"temperature": 0.5})
  assert count(pipe, entries("ar"), warm) == 2
  # A model whose own temperature that is asks the same question.
  config = pipe.family.config.copy_and_resolve_references()
  config.sampling.temperature = 0.5
  own = dataclasses.replace(
      pipe, family=dataclasses.replace(pipe.family, config=config))
  assert count(own, entries("ar"), job) == 0
  config.sampling.temperature = 0.7
  assert count(own, entries("ar"), job) == 2
  other = dataclasses.replace(job, prompts=("cat", "red heart"))
  assert count(pipe, entries("ar"), other) == 2
  trunk = {**pipe.params["trunk"], "head": 2 * pipe.params["trunk"]["head"]}
  changed = dataclasses.replace(pipe, params={**pipe.params, "trunk": trunk})
  assert count(changed, entries("ar"), job) == 2


def test_a_damaged_shard_is_drawn_again(measured, tmp_path):
  """A cut file is noticed, not read."""
  job = Job(PROMPTS[:1])
  benchmark.run(tiny(), entries("ar"), job, tmp_path)
  (path,) = tmp_path.rglob("*.npz")
  path.write_bytes(path.read_bytes()[:-7])
  benchmark.run(tiny(), entries("ar"), job, tmp_path)
  assert len(measured) == 2


def quality_of(gap, extra, kid=None):
  interval = (gap - 0.1, gap + 0.1)
  return Quality(1.0, Gap(gap, interval), Estimate(0.0, 0.1),
                 Estimate(extra, 0.05), kid_ar=kid and Estimate(kid, 0.01))


@pytest.mark.parametrize("decoder,rerun,is_rerun,expected", [
    ((0.05, 0.0), (0.02, 0.0), False, True),
    ((-0.11, 0.09), (0.02, 0.0), False, True),
    ((0.13, 0.0), (0.02, 0.0), False, False),
    ((-0.13, 0.0), (0.02, 0.0), False, False),
    ((0.0, 0.11), (0.02, 0.0), False, False),
    ((0.0, 0.0, 0.05), (0.0, 0.0, 0.01), False, False),
    ((0.0, 0.0, 0.03), (0.0, 0.0, 0.01), False, True),
    ((0.0, 0.0, 0.05), (0.0, 0.0), False, True),
    ((0.02, 0.0), (0.02, 0.0), True, True),
    ((0.2, 0.0), (0.2, 0.0), True, False),
])
def test_within_ars_own_spread(decoder, rerun, is_rerun, expected):
  """Gap, excess and KID are held against the second AR run's, both ways."""
  got = quality.judge(quality_of(*decoder), quality_of(*rerun), is_rerun)
  assert got is expected


def test_quality_is_taken_prompt_by_prompt():
  """Images of a prompt are averaged; the first AR is the zero of gaps."""
  ar = fake_run(4)
  worse = fake_run(4, nll=ar.nll + 0.5)
  none = References(None, None, None, np.full(4, -1))
  found = quality.assess([worse, ar, worse], 1, 2, 2, None, none)
  assert found[0].gap.value == pytest.approx(0.5)
  assert found[0].gap.interval == pytest.approx((0.5, 0.5))
  assert found[0].extra.value == pytest.approx(0.5)
  assert found[1].gap == Gap(0.0, (0.0, 0.0)) and found[1].within_ar is None
  assert found[0].within_ar is True and found[2].within_ar is False
  assert found[0].fd_ar is None and found[0].recall is None
  lone = quality.assess([worse], None, None, 1, None, none)
  assert lone[0].gap is None and lone[0].within_ar is None


def test_features_give_distances_and_recall():
  """FD and KID to real pictures and to AR's; ranks of named prompts only."""
  rng = np.random.default_rng(0)
  gallery = rng.normal(size=(6, 3))
  targets = np.array([2, -1, 4, 5])
  own = gallery[[2, 0, 4, 0]]
  references = References(gallery, np.arange(6), gallery, targets)
  got = quality.assess(
      [fake_run(), fake_run()], 0, None, 1, [gallery[:4], own], references)
  assert got[0].fd_ar is None and got[0].fd_real > 0
  assert got[1].fd_ar == pytest.approx(
      metrics.frechet_distance(own, gallery[:4]))
  assert got[1].recall == pytest.approx(2 / 3)


def test_captions_and_targets():
  """Held-out captions come first; a caption finds its own emoji."""
  captions = quality.emoji_captions(None)
  held = quality.emoji_captions("validation")
  assert captions[:len(held)] == held and len(captions) > 1800
  assert not set(held) & set(quality.emoji_captions("train"))
  place, none = quality.emoji_targets([f" {held[0]}\n", "no such emoji"])
  assert EmojiSource("all").records[place].label == held[0] and none == -1


def test_rows_have_the_promised_fields():
  """Ratios are AR's over the decoder's; what is unknown is null."""
  ar, fast = fake_run(), fake_run(passes=np.array([1, 1, 1, 3]),
                                  seconds=np.full(4, 0.1))
  lone = Quality(1.0, None, Estimate(0.0, None), None)
  row = report.row(
      entries()[1], fast, ar, Traits(4, True), lone, None)
  assert set(row) == ROW
  assert row["pass_ratio"] == pytest.approx(2)
  assert row["latency_ratio"] == pytest.approx(5)
  assert row["decoder"] == "sjd" and row["settings"] == {"window": 4}
  assert row["passes"] == {"mean": 1.5, "min": 1, "max": 3}
  assert row["nll_gap"] is row["fd"] is row["fid"] is row["clip"] is None
  later = dataclasses.replace(fast, session=np.array([0, 1, 1, 1]),
                              seconds=np.array([0.25, 9.0, 9.0, 9.0]))
  row = report.row(entries()[1], later, ar, Traits(4, True), lone, None)
  assert row["latency_ratio"] == pytest.approx(2)  # of one start of both
  later = dataclasses.replace(later, session=np.ones(4, int))
  row = report.row(entries()[1], later, ar, Traits(4, True), lone, None)
  assert row["latency_ratio"] is None
  alone = report.row(
      entries()[1], fast, None, Traits(4, True), lone, None)
  assert alone["pass_ratio"] is alone["latency_ratio"] is None
  detail = report.detail(entries()[1], fast, lone, None)
  assert "| sjd:window=4 |" in report.table([row], [detail])
  json.dumps([row, detail], allow_nan=False)
  assert "add a second ar run" in report.table([row], [detail])
  assert report.panels([row], [detail]) == []


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
  """The command draws with the tiny pipeline and keeps no programs."""
  monkeypatch.setattr(common, "load_pipeline", tiny)
  monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
  monkeypatch.setattr(efficientnet, "available", lambda: False)


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


def test_greedy_runs_are_all_alike(on_tiny, capsys, tmp_path):
  """Without any spread there is a table and a plot all the same."""
  status, out, _ = call(
      capsys, "--decoders", "ar,ar:seed=1", "--num_prompts", 3, "--batch", 3,
      "--temperature", 0, "--out", tmp_path)
  assert status == 0 and "| ar:seed=1 |" in out
  assert (tmp_path / "pareto.png").exists()


def test_an_edited_decoder_of_ones_own_draws_anew(on_tiny, capsys, tmp_path):
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
  """Distances and recall are filled in; pictures are exported for scorers."""
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
    (["--decoders", "ssd"], "heads"), (["--top_p", "2"], "top_p"),
    (["--exactness", "--draws", "3"], "draws"),
    (["--exactness", "--guidance", "3"], "--guidance"),
    (["--top_k", "99999999999"], "top_k"), (["--guidance", "1e38"], "guidance"),
])
def test_mistakes_end_in_one_line(on_tiny, capsys, tmp_path, args, named):
  """Exit status 2, one line that names the culprit, nothing written."""
  out = tmp_path / "out"
  status, _, err = call(capsys, *args, "--out", out)
  assert status == 2
  assert named in err.splitlines()[-1] and "expected" in err.splitlines()[-1]
  assert "Traceback" not in err and not list(out.rglob("*.json"))


def test_a_missing_extra_is_told_before_any_work(
    on_tiny, monkeypatch, capsys, tmp_path):
  """Nothing is drawn when the networks asked for are not at hand."""
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


def test_exactness_prints_its_table(on_tiny, monkeypatch, capsys, tmp_path):
  """The laboratory's verdicts, alone and in groups, on paper and in JSON."""
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
