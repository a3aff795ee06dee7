"""infer.benchmark: what it measures, keeps, compares and writes."""

import dataclasses
import functools

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.jacobi.sjd import SJD
from ssd_jax.decoding.rows.zipar import ZipAR
from ssd_jax.evaluation import benchmark
from ssd_jax.evaluation.benchmark import Entry, Job, Run, Traits
from ssd_jax.pipeline import testing

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
  with pytest.raises(UserError, match="Expected .*got") as error:
    benchmark.parse_entries(text, 0)
  assert named in str(error.value) and "\n" not in str(error.value)


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
