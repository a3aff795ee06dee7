"""Body of infer.benchmark --profile: where the time of a pass goes.

  --out/profile.json   every figure, seconds
  --out/profile.md     the same for people, milliseconds
  --out/profile.png    the parts and the roofline over the queries of a pass
  --out/trace          of one batch, for TensorBoard, Perfetto or XProf
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Unpack

import jax

from ssd_jax.core.extras import need
from ssd_jax.decoding.sampling import Overrides
from ssd_jax.performance import profiler as profiler_lib
from ssd_jax.performance.profiler import PARTS, Host, Profiler, Row
from ssd_jax.performance.roofline import Machine
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage.files import replacing, write_json, write_text

_WORDS = """
A pass feeds Q slots of each image. *trunk* (which includes *attention*, its \
products with the cache), *head*, *sampling* (the target distribution, its \
noise and the draw), *acceptance* (the test of drafts and the residual) and \
*drafting* (one token for each query by a spatial head; not part of the pass \
measured here) are the engine's functions timed by themselves, several calls \
in one program. *pass* is one iteration of the loop while it generates whole \
images with sjd:window=Q; *loop* is what a pass has beyond its parts. *least* \
is the larger of two times: of the bytes that must move (keys and values once, \
weights once by each device) at the measured bandwidth, and of the pass's \
operations at the measured rate. Each time is the best of several. On a CPU, \
arrays that fit its caches are read faster than memory; the bandwidth is that \
of as many bytes as a pass reads.

{machines}

The host, for {images} image(s) of {passes} passes in {whole:.0f} ms: prompt \
{prompt:.1f} ms, generation {drawing:.0f} ms, pixels {pixels:.0f} ms, all else \
{rest:.1f} ms ({each:.3f} ms per pass).
"""


def profile(
  pipe: Pipeline,
  text: str,
  batch: int,
  out: pathlib.Path,
  queries: Sequence[int] = profiler_lib.QUERIES,
  **sampling: Unpack[Overrides],
) -> None:
  """Measures passes of a model and writes what was found."""
  _, guided = pipe.sampling(**sampling)
  most, streams = pipe.model.grid.length, 1 + guided
  batch = sharding.even_batch(batch, streams)
  on = functools.cache(
      lambda mesh: Profiler(pipe, text, batch, mesh, **sampling))
  profiler_of = lambda count: on(sharding.cpu_mesh(batch * streams, count))
  queries = sorted({min(count, most) for count in queries})
  rows = [profiler_of(count).row(count) for count in Bar(queries, unit="row")]
  machines = {x.devices: x.machine for x in map(profiler_of, queries)}
  profiler = profiler_of(queries[-1])
  host = profiler.host(queries[-1])
  profiler.trace(out / "trace", queries[-1])
  text = table(rows) + _words(rows, machines, host, batch)
  write_text(out / "profile.md", text)
  write_json(out / "profile.json", dict(
      device=f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}",
      batch=batch, machines={
          str(count): dataclasses.asdict(x) for count, x in machines.items()},
      host=dataclasses.asdict(host),
      rows=[dict(dataclasses.asdict(row), rest=row.rest) for row in rows]))
  plot(rows, out / "profile.png")
  print(text)
  print(f"wrote {out / 'profile.json'}, profile.md, profile.png and trace")


def table(rows: Sequence[Row]) -> str:
  """Markdown, milliseconds."""
  heads = ["queries", "devices", "trunk", "attention", *PARTS[1:], "pass",
           "loop", "least", "pass / least", "pass / first"]
  lines = [heads, ["---:"] * len(heads)]
  for row in rows:
    ms = lambda x: "-" if x is None else f"{x * 1e3:.2f}"
    lines.append([
        str(row.queries), str(row.devices), ms(row.parts["trunk"]),
        ms(row.attention), *[ms(row.parts[name]) for name in PARTS[1:]],
        ms(row.whole),
        ms(row.rest), ms(row.least), f"{row.whole / row.least:.2f}",
        f"{row.whole / rows[0].whole:.2f}"])
  return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _words(
    rows: Sequence[Row], machines: dict[int, Machine], host: Host, batch: int
) -> str:
  ms = {name: getattr(host, name) * 1e3
        for name in ("prompt", "drawing", "pixels", "rest")}
  least = {row.devices: row.bytes for row in rows}
  lines = [
      f"{count} device{'s' * (count > 1)}: {least[count] / 1e6:.1f} MB a pass "
      f"at {x.bandwidth / 1e9:.1f} GB/s; {x.flops / 1e9:.0f} GFLOP/s.  \n"
      for count, x in machines.items()]
  return _WORDS.format(
      machines="".join(lines), images=batch, passes=host.passes,
      whole=sum(ms.values()), **ms, each=ms["rest"] / host.passes)


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Draws the parts as bars, the whole pass and the roofline as lines."""
  figure = need("matplotlib.figure", "bench").Figure((8, 5), layout="tight")
  axes, places = figure.subplots(), range(len(rows))
  ms = lambda values: [1e3 * x for x in values]
  trunk = [r.parts["trunk"] or 0.0 for r in rows]
  inside = [min(r.attention, t) for r, t in zip(rows, trunk, strict=True)]
  bars = {
      "trunk without attention": ms(
          t - x for t, x in zip(trunk, inside, strict=True)),
      "attention": ms(inside)}
  bars |= {name: ms(r.parts[name] or 0.0 for r in rows)
           for name in ("head", "sampling", "acceptance")}
  bars["loop"] = ms(max(r.rest, 0.0) for r in rows)
  below = [0.0] * len(rows)
  for name, heights in bars.items():
    axes.bar(places, heights, bottom=below, label=name)
    below = [a + b for a, b in zip(below, heights, strict=True)]
  axes.plot(places, ms(r.whole for r in rows), "k.-", label="pass of the loop")
  axes.plot(places, ms(r.least for r in rows), "r--", label="roofline")
  if rows[0].parts["drafting"] is not None:
    axes.plot(places, ms(r.parts["drafting"] for r in rows), "b:",
              label="drafting Q tokens (not in the pass)")
  axes.set_xticks(places, [str(r.queries) for r in rows])
  axes.set_xlabel("queries of a pass, for each image")
  axes.set_ylabel("milliseconds")
  axes.set_title("Where the time of a pass goes")
  axes.set_ylim(0, 1.08 * max(below + ms(r.whole for r in rows)))
  axes.legend(loc="upper left")
  with replacing(path) as partial:
    figure.savefig(partial, format="png", dpi=120)
