"""What a comparison found, as JSON rows, a table and the points of a plot."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssd_jax.benchmark import Entry, Run
from ssd_jax.decoding import by_name
from ssd_jax.hub_metrics import HubFigures
from ssd_jax.metrics import Estimate
from ssd_jax.pictures import Point
from ssd_jax.quality import Quality

_NOTES = """
*pass ratio*, *latency ratio*: the first ar's over the decoder's, above 1 is \
faster. *queries*: slots fed per pass and image, idle ones included. *gap*: \
mean surprisal of the base model per cell (guided, before top-k and top-p) \
minus ar's for the same prompts, nats, with a 95% bootstrap interval over \
prompts: above 0 damaged, below 0 collapsed. *excess*: mean over cells of \
surprisal minus entropy, minus ar's. *FD*, *KID*: distances in \
EfficientNet-Lite0's features, not the FID of the literature; FD is biased by \
the number of images, KID is not. *R@k*: the emoji asked for is among the k \
nearest of all. *in ar's spread*: gap and excess lie no further from 0 than \
the farther end of the 95% interval of the second ar run, and KID to ar \
exceeds that run's by no more than 1.96 standard errors; the second run is \
held to its own intervals; "?" without a second ar run (such as ar:seed=1). \
*peak memory*: of the compiled program, weights included.
"""


def row(
    entry: Entry, run: Run, ar: Run | None, queries: int, quality: Quality,
    hub: HubFigures | None,
) -> dict[str, Any]:
  """The decoder's row of results.json; null for what was not computed."""
  q25, median, q75 = np.quantile(run.seconds, [0.25, 0.5, 0.75])
  gap = quality.gap
  return {
      "decoder": entry.decoder.name,
      "settings": by_name.settings(entry.decoder),
      "seed": entry.seed,
      "lossless": bool(entry.decoder.lossless),
      "passes": {
          "mean": float(run.passes.mean()), "min": int(run.passes.min()),
          "max": int(run.passes.max())},
      "pass_ratio": ratio(ar and ar.passes.mean(), run.passes.mean()),
      "queries": queries,
      "seconds": {
          "median": float(median), "q25": float(q25), "q75": float(q75)},
      "latency_ratio": ratio(ar and np.median(ar.seconds), median),
      "nll": quality.nll,
      "nll_gap": gap and gap.value,
      "nll_gap_interval": gap and gap.interval and list(gap.interval),
      "excess": quality.excess.value,
      "excess_error": quality.excess.error,
      "fd": quality.fd_real,
      "kid": quality.kid_real and quality.kid_real.value,
      "recall_at_1": quality.recall,
      "recall_at_10": quality.recall_10,
      "fid": hub and hub.fid,
      "clip": hub and hub.clip,
      "within_ar_spread": quality.within_ar,
      "images": len(run.passes),
  }


def detail(
    entry: Entry, run: Run, quality: Quality, hub: HubFigures | None
) -> dict[str, Any]:
  """What results.json has no place for, figures of single images included."""
  memory = int(run.memory.max())
  cells = run.tokens[0].size
  return {
      "label": entry.label,
      "tokens_per_pass": float((cells / run.passes).mean()),
      "peak_memory": memory if memory >= 0 else None,
      "excess_over_ar": _pair(quality.extra),
      "fd_to_ar": quality.fd_ar,
      "kid_to_ar": _pair(quality.kid_ar),
      "kid_to_real": _pair(quality.kid_real),
      "inception_score": hub and hub.inception,
      "per_image": {
          name: getattr(run, name).tolist()
          for name in ("passes", "seconds", "nll", "entropy")},
  }


def _pair(estimate: Estimate | None) -> list[float | None] | None:
  return None if estimate is None else [estimate.value, estimate.error]


def ratio(ar: float | None, own: float) -> float | None:
  """AR's over the decoder's own."""
  return None if ar is None else float(ar / own)


def table(rows: Sequence[dict], details: Sequence[dict]) -> str:
  """A markdown table of rows and their details, with what the words mean."""
  heads = (
      "decoder", "lossless", "passes (min-max)", "pass ratio", "cells/pass",
      "queries", "s/image [quartiles]", "latency ratio", "nll", "gap [95%]",
      "excess", "FD real", "FD ar", "KID real", "KID ar", "R@1", "R@10",
      "in ar's spread", "peak memory")
  lines = [_line(heads), _line(["---"] * len(heads))]
  lines += [_line(_cells(r, d)) for r, d in zip(rows, details, strict=True)]
  return "\n".join(lines) + "\n" + _NOTES


def _line(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cells)} |"


def _cells(r: dict, d: dict) -> list[str]:
  """The texts of one line of the table."""
  passes, seconds = r["passes"], r["seconds"]
  interval = r["nll_gap_interval"]
  gap = _number(r["nll_gap"], "+.3f")
  if interval:
    gap += f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
  verdict = {None: "?", True: "yes", False: "no"}[r["within_ar_spread"]]
  memory = d["peak_memory"]
  return [
      d["label"], "yes" if r["lossless"] else "no",
      f"{passes['mean']:.1f} ({passes['min']}-{passes['max']})",
      _number(r["pass_ratio"], ".2f"), f"{d['tokens_per_pass']:.2f}",
      str(r["queries"]),
      f"{seconds['median']:.3g} [{seconds['q25']:.3g}, {seconds['q75']:.3g}]",
      _number(r["latency_ratio"], ".2f"), f"{r['nll']:.3f}", gap,
      _estimate(d["excess_over_ar"], "+.3f"), _number(r["fd"], ".1f"),
      _number(d["fd_to_ar"], ".1f"), _estimate(d["kid_to_real"], ".3f"),
      _estimate(d["kid_to_ar"], ".3f"), _number(r["recall_at_1"], ".0%"),
      _number(r["recall_at_10"], ".0%"), verdict,
      "-" if memory is None else f"{memory / 2**20:.0f} MiB",
  ]


def _number(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)


def _estimate(pair: Sequence[float | None] | None, form: str) -> str:
  if pair is None:
    return "-"
  value, error = pair
  text = format(value, form)
  return text if error is None else f"{text} +-{error:.3f}"


def points(rows: Sequence[dict], details: Sequence[dict]) -> list[Point]:
  """Speed and likelihood gap of each decoder; none without an AR run."""
  ar = next((r for r in rows if r["decoder"] == "ar"), None)
  if ar is None:
    return []
  time = ar["seconds"]["median"]
  return [
      Point(d["label"], r["latency_ratio"],
            (time / r["seconds"]["q75"], time / r["seconds"]["q25"]),
            r["nll_gap"], tuple(r["nll_gap_interval"] or ()) or None)
      for r, d in zip(rows, details, strict=True)]
