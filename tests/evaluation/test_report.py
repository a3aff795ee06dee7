"""Rows of a benchmark: the promised fields, ratios against AR."""

import dataclasses
import json

import numpy as np
import pytest

from ssd_jax.evaluation import benchmark, report
from ssd_jax.evaluation.benchmark import Run, Traits
from ssd_jax.evaluation.metrics import Estimate
from ssd_jax.evaluation.quality import Quality

ROW = {
    "decoder", "settings", "seed", "lossless", "passes", "pass_ratio",
    "queries", "seconds", "latency_ratio", "nll", "nll_gap",
    "nll_gap_interval", "excess", "excess_error", "fd", "kid", "recall_at_1",
    "recall_at_10", "fid", "clip", "within_ar_spread", "images"}


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
  assert "add a second AR run" in report.table([row], [detail])
  assert report.panels([row], [detail]) == []
