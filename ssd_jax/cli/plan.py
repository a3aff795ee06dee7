"""Body of infer.plan: what generation or training costs, before it runs.

Compiles for the devices of --topology, which need not be there, from shapes
alone. Figures are totals over all devices unless they say "per device". With
--measure the devices are those at hand, and what they do is measured by
generating.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import json
import pathlib
import sys

from absl import flags
import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_flags

from ssd_jax.cli import common, config_overrides, run as cli
from ssd_jax.core.config import UserError, check
from ssd_jax.core.extras import need
from ssd_jax.decoding import registry
from ssd_jax.decoding.rows.ssd import SSD
from ssd_jax.evaluation import quality
from ssd_jax.performance import (
  chips,
  compiled,
  cost_model as planning,
  pass_counts,
  training_cost as training_plan,
  tuning,
)
from ssd_jax.pipeline import model_folder
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage.files import replacing, write_text

# Prompts per decoder of --measure, and timed calls at least.
_PROMPTS, _CALLS = 8, 3
_LEAST_COPY = 10**6  # bytes of a copy that is reported


def define_flags() -> None:
  """Defines the command's own flags."""
  flags.DEFINE_string(
      "topology", "", "Devices to plan for: TPUs such as v5e:2x4 or v5p:2x2x1, "
      "GPUs such as h100, h200:8, a100 or l4; default: those of this machine.")
  flags.DEFINE_string("decoder", "ssd", "NAME or NAME:key=value+key=value.")
  flags.DEFINE_integer("batch", None, "Images per batch; default: 1. With "
                       "--train, images per step; default: the config's.")
  flags.DEFINE_bool("train", False, "Plan train.mtp, not generation: "
                    "its images, then its training steps.")
  flags.DEFINE_integer(
      "passes", None, "Measured passes per image, for a decoder whose count "
      "depends on the image; with --train, of config.mtp.draw.decoder.")
  flags.DEFINE_float(
      "price", None, "Dollars per device and hour; with --train. Default: the "
      "list price of a TPU.")
  flags.DEFINE_bool(
      "measure", False, "Instead try settings of decoders that may suit "
      "the devices at hand, and report the time of each. With the embedded "
      "model, --config.checkpoint or, of a published family without it, "
      "random weights: these draft nothing that is accepted, so only decoders "
      "with a fixed number of passes are tried.")
  flags.DEFINE_string("plot", "", "PNG of the time per pass over its queries.")
  flags.DEFINE_string(
      "hlo", "", "File to write the text of the compiled generation to.")
  flags.DEFINE_bool("json", False, "Print one line of JSON at the end.")


def body() -> None:
  """Reports the plan that the flags ask for."""
  args = flags.FLAGS
  decoder = registry.parse(args.decoder)
  for name, least in (("batch", 1), ("passes", 1), ("price", 0)):
    value = getattr(args, name)
    check(value is None or value >= least, name, value, f">= {least}")
  _check_mode(args)
  common.refuse_preview(args.config, "plans")
  if args.measure:
    _measure(args.config, args.batch or 1, args.json)
    return
  devices = chips.devices_of(args.topology)
  text = cli.MESH.value or f"tensor={_fitting(len(devices))}"
  mesh = sharding.make_mesh(text, devices)
  chip = chips.chip_of(devices[0])
  if args.price is not None:
    chip = dataclasses.replace(chip, dollars=args.price)
  dtype = jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16
  network = planning.Network.of(args.config, dtype)
  if args.train:
    found = training_plan.whole(
        network, args.config, mesh, chip, args.batch, args.passes)
  else:
    plan = planning.Plan(network, decoder, mesh, args.batch or 1)
    found = generation_report(plan, chip, args.passes, args.hlo)
  found = {"family": args.config.family,
           "topology": args.topology or devices[0].device_kind,
           "devices": mesh.size, "mesh": dict(mesh.shape), **found}
  if args.plot and not args.train:
    plot(found, pathlib.Path(args.plot))
  print_report(found)
  if args.json:
    print(json.dumps(found))


def _check_mode(args: flags.FlagValues) -> None:
  """Raises UserError for a flag that the mode does not read."""
  modes = {"train": ("decoder", "plot", "hlo"),
           "measure": ("decoder", "passes", "price", "plot", "hlo", "topology",
                       "train")}
  for mode, unread in modes.items():
    for name in unread:
      if args[mode].value and args[name].present:
        raise UserError("Expected only --batch, --config, --json and --mesh, "
                        f"got --{name} with --{mode}, which does not read it. "
                        "Leave it out.")
  if args.price is not None and not args.train:
    raise UserError("Expected --train with --price, got --price alone. Leave "
                    "it out, or add --train.")
  for name in ("plot", "hlo"):
    path = pathlib.Path(args[name].value or "")
    if args[name].value and path.is_dir():
      raise UserError(f"Expected a file, got --{name} {path}, which is a "
                      "folder. Add the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)


def _fitting(devices: int) -> int:
  """Returns the most devices that can share the trunk's attention heads."""
  config = flags.FLAGS.config
  heads = config.trunk.n_kv_heads
  return max(n for n in range(1, devices + 1) if heads % n == 0)


def _measure(config: ml_collections.ConfigDict, batch: int, as_json: bool):
  """Measures the config's model on the devices of the flags."""
  cli.use_compilation_cache()
  flag = flags.FLAGS["config"]
  is_overridden = "checkpoint" in config_flags.get_override_values(flag)
  checkpoint = config.get("checkpoint", "")
  is_made = config.family == "emoji" or is_overridden or (
      pathlib.Path(checkpoint) / "model.json").is_file()
  same = f"--config {config_flags.get_config_filename(flag)} " * flag.present
  if is_made:
    cli.refuse_unused(
        "checkpoint", "sampling", *model_folder.CHOICES.get(config.family, ()))
    same += f"--checkpoint {checkpoint} " * bool(checkpoint)
  with cli.devices(draws=True):
    if is_made:
      pipe = model_folder.load(
          checkpoint or "emoji", choices=config_overrides.choices(config))
      config_overrides.check_family(pipe, config)
    else:
      pipe = model_folder.from_config(config)
      same += "--random_weights "
    measure(pipe, is_made, batch, as_json, same)


def measure(
    pipe: Pipeline, is_trained: bool, batch: int, as_json: bool, same: str = ""
) -> None:
  """Times each candidate on the devices at hand and reports.

  Args:
    pipe: The model.
    is_trained: Whether its drafts say anything.
    batch: Images generated together.
    as_json: Whether to end with a line of JSON.
    same: Flags that name the model to other commands.
  """
  batch = sharding.even_batch(batch, 1 + pipe.sampling()[1])
  captions = (quality.emoji_captions("train") if pipe.family.name == "emoji"
              else [planning.text_for(pipe.family)])
  names = tuning.candidates(pipe.model, is_trained)
  count = batch * max(_CALLS, -(-_PROMPTS // batch))
  texts = list(itertools.islice(itertools.cycle(captions), count))
  with Bar(total=len(names), desc="compiling", unit="decoder") as bar:
    found = tuning.run(pipe, names, texts, batch, lambda _: bar.update(1))
  print(trials_table(found))
  lossless = next(x for x in found if x.lossless)
  print(f"fastest lossless: {lossless.decoder}, {lossless.ratio:.2f} times as "
        f"fast as ar. What the others lose: python -m infer.benchmark {same}"
        f"--decoders {','.join(x.decoder for x in found)}")
  if as_json:
    print(json.dumps([dataclasses.asdict(x) for x in found]))


def trials_table(found: Sequence[tuning.Measurement]) -> str:
  """Returns the measurements as Markdown."""
  lines = ["| decoder | lossless | queries | passes | s/image | over ar |",
           "| --- | --- | ---: | ---: | ---: | ---: |"]
  return "\n".join(lines + [
      f"| {x.decoder} | {'yes' if x.lossless else 'no'} | {x.queries} "
      f"| {x.passes:.1f} | {x.seconds:.3f} | {x.ratio:.2f} |" for x in found])


def generation_report(
    plan: planning.Plan, chip: chips.Chip, passes: int | None = None,
    hlo: str = "",
) -> dict:
  """Returns the plan of generation as JSON.

  Args:
    plan: The generation to plan.
    chip: Each of the devices.
    passes: Of an image, measured.
    hlo: File for the text of the compiled program, if any.
  """
  network, decoder = plan.network, plan.decoder
  memory, fits, sent, xla, text = compiled_figures(plan, chip)
  copies = compiled.moves_in_loops(text, _LEAST_COPY) if text else []
  if hlo and text:  # else it does not fit, which the report says
    write_text(hlo, text)
  flops, moved = plan.counts(plan.queries)
  time = lambda queries: planning.seconds(plan, queries, chip, sent)
  took = planning.parts(plan, plan.queries, chip, sent)
  passes = passes or pass_counts.fixed_passes(decoder, network.model)
  sizes = sorted({*planning.QUERIES, plan.queries})
  return {
      "decoder": decoder.name, "settings": registry.settings(decoder),
      "batch": plan.batch,
      "parameters": planning.count(network.params["trunk"]),
      "memory_per_device": memory, "fits": fits, "queries": plan.queries,
      "bytes_per_pass": int(moved), "flops_per_pass": int(flops),
      "xla_bytes_per_pass": xla and int(xla[1]),
      "xla_flops_per_pass": xla and int(xla[0]),
      "collectives": {x.kind: {"count": x.count, "bytes": x.bytes}
                      for x in sent},
      "copies_per_pass": {
          "count": sum(x.count for x in copies),
          "bytes": sum(x.count * x.bytes for x in copies)},
      "launches_per_pass": compiled.launches(text) if text else None,
      "bound": max(took, key=took.__getitem__),
      "roofline_ms": {str(n): round(1e3 * time(n), 4) for n in sizes},
      "passes": passes,
      "image_seconds": passes and round(passes * time(plan.queries), 4),
      "best": best(network, decoder, time),
  }


def compiled_figures(plan, chip):
  """Returns (bytes per device, fits, collectives, XLA's counts, text)."""
  devices = plan.mesh.size
  try:
    program = plan.compile_generation()
    memory = planning.memory_of(program) + plan.stacked_bytes
    text = program.as_text()
  except jax.errors.JaxRuntimeError as error:
    memory = planning.out_of_memory(error)
    if memory is None:
      raise
    return memory, False, [], None, ""
  programs = *plan.compile_pass(), plan.network.generator.cfg.n_layers, devices
  return (memory, memory <= chip.memory, planning.sent_by(*programs),
          planning.xla_counts(*programs), text)


def best(network, decoder, time) -> dict:
  """Returns SSD's fastest schedule with the decoder's rounds, or with 2."""
  rounds = decoder.rounds if isinstance(decoder, SSD) else 2
  found = [(passes * time(queries), name, passes, queries)
           for name, passes, queries in pass_counts.of_rows(
               rounds, network.model)]
  seconds, name, passes, queries = min(found)
  return {"decoder": name, "passes": passes, "queries": queries,
          "image_seconds": round(seconds, 4)}


def print_report(found: dict) -> None:
  """Prints the report."""
  for key, value in found.items():
    if isinstance(value, dict):
      value = ", ".join(f"{k} {v}" for k, v in value.items())
    elif isinstance(value, int) and not isinstance(value, bool) and (
        value > 10**6):
      value = f"{value / 1e9:,.3f} billion"
    print(f"{key:>22}  {value}")
  if found["fits"] is False:
    print("it does not fit: share the weights by a larger tensor or fsdp, or "
          "decode fewer images together", file=sys.stderr)


def plot(found: dict, path: pathlib.Path) -> None:
  """Plots the time of a pass over its queries."""
  matplotlib = need("matplotlib.figure", "bench")
  figure = matplotlib.Figure((6, 4), layout="tight")
  axes = figure.subplots()
  sizes = [int(n) for n in found["roofline_ms"]]
  axes.loglog(sizes, list(found["roofline_ms"].values()), "o-", base=2)
  axes.axvline(found["queries"], linestyle=":", color="grey")
  axes.set(xlabel="queries of a pass", ylabel="least milliseconds of a pass",
           title=f"{found['family']} on {found['topology']}, {found['mesh']}")
  with replacing(path) as partial:
    figure.savefig(partial, format="png")


def main() -> None:
  """Console entry point."""
  define_flags()
  cli.define_config()
  cli.main(body, runs_here=False)
