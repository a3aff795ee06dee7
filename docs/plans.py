"""Writes the tables of docs/plan.md: all families on TPUs of three kinds.

    pip install 'ssd-jax[plan]'
    python docs/plans.py

Every row is what `infer.plan` reports for it, but that the whole program is
compiled for the first slice alone: its memory is that of shapes and mesh, which
are the same for all. Rows are kept in docs/plans.jsonl as they are compiled, a
minute each; those that are there are not compiled again: remove the file to
renew them.
"""

import importlib
import json
import math
import pathlib
import sys

import jax.numpy as jnp

FOLDER = pathlib.Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))  # for configs/

from ssd_jax.decoding import registry  # noqa: E402
from ssd_jax.performance import (  # noqa: E402
  chips,
  cost_model as planning,
  image_cost,
  pass_counts,
  training_cost as training_plan,
)
from ssd_jax.runtime import sharding  # noqa: E402
from ssd_jax.storage.files import write_text  # noqa: E402

CONFIGS = ("lumina", "anole", "emu3", "janus_pro:7b", "llamagen", "emoji")
SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
DECODERS = ("ssd", "ar", "exact")  # the first is compiled, all share its pass
COUNTED = ("ssd", "ar")  # whose passes do not depend on the picture
MESH = "tensor=4"
TRAINED = ("lumina", "janus_pro:7b", "emu3")
TRAINED_ON = {"v5e:4x4": "data=4,tensor=4", "h100:8": "data=8"}
ROWS = FOLDER / "plans.jsonl"
PAGE = FOLDER / "plan.md"
MARK = "<!-- written by docs/plans.py -->\n"


def settings_of(name):
  """The settings of configs/NAME.py[:variant]."""
  module, _, variant = name.partition(":")
  get = importlib.import_module(f"configs.{module}").get_config
  return get(variant) if variant else get()


def drawing(name, topology, memory):
  """What a pass of each decoder takes.

  Args:
    name: Of a config.
    topology: For which a pass is compiled.
    memory: Of the whole program, or None to compile that too.
  """
  network, mesh, chip = _of(name, topology, MESH)
  plans = {text: planning.Plan(network, registry.parse(text), mesh, 1)
           for text in DECODERS}
  first = plans[DECODERS[0]]
  if memory is None:
    memory = planning.memory_of(first.compile_generation())
  layers = network.generator.cfg.n_layers
  sent = planning.sent_by(*first.compile_pass(), layers, mesh.size)
  passes = {text: pass_counts.fixed_passes(plan.decoder, network.model)
            for text, plan in plans.items()}
  return {
      "billions": planning.count(network.params["trunk"]) / 1e9,
      "memory": memory, "fits": memory <= chip.memory,
      "sent": {x.kind: x.count for x in sent},
      "decoders": {text: {
          "queries": plan.queries, "passes": passes[text],
          "parts": planning.parts(first, plan.queries, chip, sent)}
          for text, plan in plans.items()}}


def training(name, topology):
  """What `infer.plan --train` reports of the steps."""
  network, mesh, chip = _of(name, topology, TRAINED_ON[topology])
  found = training_plan.report(network, settings_of(name), mesh, chip, None)
  return found | {"price": chip.dollars}


def images(name, topology):
  """What `infer.plan --train` reports of the images."""
  network, mesh, chip = _of(name, topology, TRAINED_ON[topology])
  return dict(image_cost.report(network, settings_of(name), mesh, chip))


def _of(name, topology, mesh):
  devices = chips.devices_of(topology)
  network = planning.Network.of(settings_of(name), jnp.bfloat16)
  return (network, sharding.make_mesh(mesh, devices),
          chips.chip_of(devices[0]))


def kept():
  """{(kind, config, slice): report} of what was compiled before."""
  lines = ROWS.read_text("utf-8").splitlines() if ROWS.exists() else []
  return {tuple(key): report for key, report in map(json.loads, lines)}


def rows():
  """{(kind, config, slice): report}, of which missing ones are compiled."""
  wanted = [("draw", name, topology)
            for topology in SLICES for name in CONFIGS]
  wanted += [(kind, name, topology) for kind in ("images", "train")
             for topology in TRAINED_ON for name in TRAINED]
  found = kept()
  for key in wanted:
    if key in found:
      continue
    print(*key, flush=True)
    kind, name, topology = key
    if kind != "draw":
      found[key] = {"train": training, "images": images}[kind](name, topology)
    else:
      whole = found.get((kind, name, SLICES[0]))
      found[key] = drawing(name, topology, whole and whole["memory"])
    write_text(
        ROWS, "".join(f"{json.dumps(row)}\n" for row in found.items()))
  return {key: found[key] for key in wanted}


def drawn_table(found):
  """One line per slice and family."""
  lines = [
      "| slice | family | 10^9 weights | GB per device | fits | "
      + " | ".join(f"`{x}`: queries, ms per pass, bound" for x in DECODERS)
      + " | s per image: " + ", ".join(f"`{x}`" for x in COUNTED) + " |",
      "|---" * (6 + len(DECODERS)) + "|"]
  for (_, name, topology), row in found.items():
    cells, images = [], []
    for text, part in row["decoders"].items():
      took = part["parts"]
      least = max(took["compute"], took["memory"]) + took["collectives"]
      cells.append(f"{part['queries']}, {1e3 * least:.3g}, "
                   f"{max(took, key=took.get)}")
      if text in COUNTED:
        images.append(f"{part['passes'] * least:.3g}")
    lines.append(" | ".join([
        f"| {topology}", name, f"{row['billions']:.3g}",
        f"{row['memory'] / 1e9:.3g}", "yes" if row["fits"] else "no", *cells,
        ", ".join(images)]) + " |")
  return "\n".join(lines)


def images_table(found):
  """One line per slice and family."""
  lines = [
      "| slice, mesh | family | images | passes | batch: hours by `exact`, by "
      "`ar` | largest batch: hours by `exact`, by `ar` |", "|---" * 6 + "|"]
  for (_, name, topology), row in found.items():
    cells = []
    for batch in (row["draw_batch"], row["draw_largest_batch"]):
      cells.append(f"{batch['batch']}: {batch['hours']:.2f}, "
                   f"{batch['hours_by_ar']:.2f}"
                   if batch.get("fits", batch["batch"]) else "-")
    lines.append(" | ".join([
        f"| {topology}, {TRAINED_ON[topology]}", name, f"{row['images']:,}",
        f"{row['draw_passes']:.0f}", *cells]) + " |")
  return "\n".join(lines)


def trained_table(found, drawn):
  """One line per slice and family.

  Args:
    found: Reports of the steps.
    drawn: Reports of the images, by the same family and slice.
  """
  lines = [
      "| slice | family | 10^9 trained | batch | largest that fits at once | "
      "accumulated in | GB per device | s per step | hours of steps | "
      "hours with images | dollars |",
      "|---" * 11 + "|"]
  for (_, name, topology), row in found.items():
    hours = row["train_hours"] + drawn["images", name, topology]["draw_hours"]
    devices = math.prod(sharding.parse(TRAINED_ON[topology]).values())
    lines.append(" | ".join(str(x) for x in [
        f"| {topology}", name, f"{row['trained_parameters'] / 1e9:.2f}",
        row["batch"], row["largest_batch"], row["accumulate"],
        f"{row['memory_per_device'] / 1e9:.2f}", f"{row['step_seconds']:.2f}",
        f"{row['train_hours']:.2f}", f"{hours:.2f}",
        f"{hours * devices * row['price']:.0f}" if row["price"] else "-"])
        + " |")
  return "\n".join(lines)


def tables(found):
  """What stands below the page's mark."""
  of_kind = lambda kind: {k: v for k, v in found.items() if k[0] == kind}
  return "\n\n".join([
      f"## One image, `--mesh {MESH}`", drawn_table(of_kind("draw")),
      "## The images of train.mtp, `--train`", images_table(of_kind("images")),
      "## Its steps, and the whole, `--train`",
      trained_table(of_kind("train"), of_kind("images"))]) + "\n"


def main():
  """Compiles what is missing and writes both tables below the page's mark."""
  above, _, _ = PAGE.read_text("utf-8").partition(MARK)
  write_text(PAGE, f"{above}{MARK}\n{tables(rows())}")


if __name__ == "__main__":
  main()
