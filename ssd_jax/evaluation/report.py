"""The report of a benchmark: JSON rows, Markdown tables, points of a plot."""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from ssd_jax.decoding import registry
from ssd_jax.evaluation.benchmark import Entry, Run, Traits
from ssd_jax.evaluation.hub_metrics import HubFigures
from ssd_jax.evaluation.metrics import Estimate
from ssd_jax.evaluation.quality import Quality
from ssd_jax.visualization.animations import Panel, Point

LEGEND = """
- *pass ratio*, *latency ratio*: the first AR row's passes and seconds over the
  decoder's; above 1 the decoder is faster. *tokens/pass*: mean over images.
  *queries*: slots fed per pass and image, idle ones included. *s/image*: median
  and quartiles over images, compilation excluded; decoders take turns batch by
  batch, and images from an earlier start of the command are left out of the
  latency ratio. *peak memory*: of the compiled program, weights included.
- *nll*: mean negative log-likelihood per token under the base model, guided, at
  the temperature, before top-k and top-p, in nats. *gap*: NLL minus AR's for
  the same prompts, with a 95% bootstrap interval over prompts: above 0 the
  images are damaged, below 0 they have collapsed. *excess*: mean over tokens of
  NLL minus entropy, 0 in expectation for a lossless decoder that filters
  nothing; *over AR*: excess minus AR's, prompt by prompt.
- *FD*, *KID*: distances to real images and to AR's in the features of
  EfficientNet-Lite0, not the FID of the literature. FD is biased upwards for
  few images; KID, which leaves out pairs of one prompt, is not. *R@k*: the
  emoji asked for is among the k nearest of all 1,852. ± is one standard error.
- A decoder is *within AR's spread* if its gap and its excess over AR lie no
  further from 0 than the farther end of the 95% intervals of a second AR run,
  and its KID to AR exceeds that run's by at most 1.96 standard errors; the
  second AR run itself if 0 lies in its intervals.
"""
_YARDSTICK = """
**AR's own spread**, {label} against ar: gap {gap}, excess {extra}, FD {fd},
KID {kid}.
"""
_NO_YARDSTICK = """
AR's own spread is unknown: add a second AR run, such as ar:seed=1, and take at
least two prompts.
"""
_VERDICTS = {None: "-", True: "yes", False: "no"}


def row(
    entry: Entry, run: Run, ar: Run | None, traits: Traits, quality: Quality,
    hub: HubFigures | None,
) -> dict[str, Any]:
  """Returns the decoder's row of results.json; None for what is unknown."""
  q25, median, q75 = np.quantile(run.seconds, [0.25, 0.5, 0.75])
  gap = quality.gap
  return {
      "decoder": entry.decoder.name,
      "settings": registry.settings(entry.decoder),
      "seed": entry.seed,
      "lossless": traits.is_lossless,
      "passes": {
          "mean": float(run.passes.mean()), "min": int(run.passes.min()),
          "max": int(run.passes.max())},
      "pass_ratio": ratio(None if ar is None else ar.passes.mean(),
                          run.passes.mean()),
      "queries": traits.queries,
      "seconds": {
          "median": float(median), "q25": float(q25), "q75": float(q75)},
      "latency_ratio": ar and _latency_ratio(ar, run),
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
  """Returns a row of details.json, figures of single images included."""
  memory = int(run.memory.max())
  num_tokens = run.tokens[0].size
  return {
      "label": entry.label,
      "tokens_per_pass": float((num_tokens / run.passes).mean()),
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
  """Returns AR's figure over the decoder's own."""
  return None if ar is None else float(ar / own)


def _latency_ratio(ar: Run, run: Run) -> float | None:
  """Returns the ratio over images that one start of the command measured."""
  is_shared = ar.session == run.session
  if not is_shared.any():
    return None
  return ratio(np.median(ar.seconds[is_shared]),
               float(np.median(run.seconds[is_shared])))


def table(rows: Sequence[dict], details: Sequence[dict]) -> str:
  """Returns the Markdown tables of a run, and how to read them."""
  return f"{tables(rows, details)}{LEGEND}"


def tables(rows: Sequence[dict], details: Sequence[dict]) -> str:
  """Returns two Markdown tables of rows and their details, and AR's spread."""
  pairs = list(zip(rows, details, strict=True))
  zero = next((r for r in rows if r["decoder"] == "ar"), None)
  speed = _table((
      "decoder", "lossless", "passes (min-max)", "pass ratio", "tokens/pass",
      "queries", "s/image [quartiles]", "latency ratio", "peak memory"),
      [_speed_columns(r, d) for r, d in pairs])
  found = _table((
      "decoder", "nll", "gap [95%]", "excess", "over AR", "FD real", "KID real",
      "FD AR", "KID AR", "R@1", "R@10", "within AR's spread"),
      [_quality_columns(r, d, r is zero) for r, d in pairs])
  return f"{speed}\n{found}{_spread(pairs)}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  whole = [heads, ["---"] * len(heads), *lines]
  return "".join(f"| {' | '.join(line)} |\n" for line in whole)


def _speed_columns(r: dict, d: dict) -> list[str]:
  passes, seconds, memory = r["passes"], r["seconds"], d["peak_memory"]
  return [
      d["label"], "yes" if r["lossless"] else "no",
      f"{passes['mean']:.1f} ({passes['min']}-{passes['max']})",
      _number(r["pass_ratio"], ".2f"), f"{d['tokens_per_pass']:.2f}",
      str(r["queries"]),
      f"{seconds['median']:.3g} [{seconds['q25']:.3g}, {seconds['q75']:.3g}]",
      _number(r["latency_ratio"], ".2f"),
      "-" if memory is None else f"{memory / 2**20:.0f} MiB",
  ]


def _quality_columns(r: dict, d: dict, is_zero: bool) -> list[str]:
  return [
      d["label"], f"{r['nll']:.3f}", "0" if is_zero else _gap(r),
      _estimate([r["excess"], r["excess_error"]], "+.3f"),
      "0" if is_zero else _estimate(d["excess_over_ar"], "+.3f"),
      _number(r["fd"], ".1f"), _estimate(d["kid_to_real"], ".3f"),
      _number(d["fd_to_ar"], ".1f"), _estimate(d["kid_to_ar"], ".3f"),
      _number(r["recall_at_1"], ".0%"), _number(r["recall_at_10"], ".0%"),
      _VERDICTS[r["within_ar_spread"]],
  ]


def _spread(pairs: Sequence[tuple[dict, dict]]) -> str:
  """Returns how much two AR runs differ, in words."""
  again = _rerun(pairs)
  if again is None or again[0]["nll_gap_interval"] is None:
    return _NO_YARDSTICK
  r, d = again
  return _YARDSTICK.format(
      label=d["label"], gap=_gap(r),
      extra=_estimate(d["excess_over_ar"], "+.3f"),
      fd=_number(d["fd_to_ar"], ".1f"), kid=_estimate(d["kid_to_ar"], ".3f"))


def _rerun(pairs: Sequence[tuple[dict, dict]]) -> tuple[dict, dict] | None:
  """Returns the first AR run whose seed differs from the first AR run's."""
  ar = [(r, d) for r, d in pairs if r["decoder"] == "ar"]
  others = [(r, d) for r, d in ar if r["seed"] != ar[0][0]["seed"]]
  return others[0] if others else None


def _gap(r: dict) -> str:
  text, interval = _number(r["nll_gap"], "+.3f"), r["nll_gap_interval"]
  if interval is None:
    return text
  return f"{text} [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _number(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)


def _estimate(pair: Sequence[float | None] | None, form: str) -> str:
  if pair is None:
    return "-"
  value, error = pair
  text = format(value, form)
  return text if error is None else f"{text} ±{error:.3f}"


def panels(
    rows: Sequence[dict], details: Sequence[dict]
) -> list[list[Panel]]:
  """Returns panels of passes and of seconds over likelihood and image quality.

  There are none without an AR run.
  """
  pairs = list(zip(rows, details, strict=True))
  ar = next((p for p in pairs if p[0]["decoder"] == "ar"), None)
  if ar is None:
    return []
  again = _rerun(pairs)
  gap, kid = "likelihood gap to AR, nats/token", "KID to AR's images"
  gaps = [(r["nll_gap"], r["nll_gap_interval"]) for r in rows]
  found: list[tuple[str, Sequence[Any], Sequence[float] | None]] = [
      (gap, gaps, again and _around_zero(again[0]["nll_gap_interval"]))]
  if all(d["kid_to_ar"] is not None for r, d in pairs if r is not ar[0]):
    kids = [d["kid_to_ar"] and (d["kid_to_ar"][0], _interval(d["kid_to_ar"]))
            for d in details]
    spread = again and _interval(again[1]["kid_to_ar"])
    found.append((kid, kids, spread and (-math.inf, spread[1])))
  return [
      [Panel(name, quality, [
          Point(r_label, is_lossless, speed[0], speed[1], value[0], value[1])
          for (r_label, is_lossless, speed), value in zip(
              speeds, values, strict=True)
           if value is not None and speed[0] is not None], spread)
       for quality, values, spread in found]
      for name, speeds in (
          ("passes", [_passes(ar[1], r, d) for r, d in pairs]),
          ("seconds", [_seconds(r, d) for r, d in pairs]))]


def _around_zero(interval: Sequence[float] | None) -> list[float] | None:
  """Returns an interval around 0 that reaches the given one's farther end."""
  if interval is None:
    return None
  farthest = max(map(abs, interval))
  return [-farthest, farthest]


def _interval(pair: Sequence[float | None] | None) -> list[float] | None:
  """Returns the 95% interval of a value and its error."""
  value, error = pair or (None, None)
  if value is None or error is None:
    return None
  return [value - 1.96 * error, value + 1.96 * error]


def _passes(ar: dict, r: dict, d: dict):
  """(label, is lossless, (ratio of passes, its quartiles over images))."""
  own = np.asarray(d["per_image"]["passes"])
  whole = np.mean(ar["per_image"]["passes"])
  q25, q75 = np.quantile(own, [0.25, 0.75])
  return d["label"], r["lossless"], (
      r["pass_ratio"], (whole / q75, whole / q25))


def _seconds(r: dict, d: dict):
  """(label, is lossless, (ratio of seconds, its quartiles over images))."""
  speed, own = r["latency_ratio"], r["seconds"]
  speeds = speed and [speed * own["median"] / own[q] for q in ("q75", "q25")]
  return d["label"], r["lossless"], (speed, speeds)
