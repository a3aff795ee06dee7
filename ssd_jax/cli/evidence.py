"""Body of infer.evidence: are hidden states as redundant as CASCADE assumes?

  --out/evidence.json   every figure
  --out/evidence.png    the same as maps and curves
"""

import pathlib

from absl import flags
import numpy as np

from ssd_jax.cli import common, run as cli
from ssd_jax.core.config import check
from ssd_jax.core.extras import need
from ssd_jax.core.prompts import clean
from ssd_jax.evaluation import prompt_files, quality, redundancy
from ssd_jax.evaluation.redundancy import THRESHOLDS, Evidence
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage.files import replacing, write_json

common.define_flags(
    "prompts_file", "seed", "batch", "out", *common.SAMPLING, *common.MODEL)


def define_flags() -> None:
  """Defines the command's own flag."""
  flags.DEFINE_integer("num_prompts", 64, "Number of prompts at most.")


def body() -> None:
  """Generates the prompts of the flags and measures states and predictions."""
  number = flags.FLAGS.num_prompts
  check(number >= 1, "num_prompts", number, ">= 1")
  matplotlib = need("matplotlib.figure", "bench")
  cli.use_compilation_cache()
  prompts = _prompts()[:number]
  out = common.writable_folder(flags.FLAGS.out or "evidence")
  pipe = common.load_pipeline()
  batch = 4 if flags.FLAGS.batch is None else flags.FLAGS.batch
  with Bar(total=2 * len(prompts), unit="image") as bar:
    drawn = pipe.generate(
        prompts, seed=flags.FLAGS.seed, batch=batch, on_batch=bar.update,
        **common.sampling())
    found = redundancy.collect(
        pipe, drawn.tokens, prompts, batch, bar.update, **common.sampling())
  write_json(out / "evidence.json", _numbers(found, len(prompts)))
  plot(found, matplotlib.Figure((13, 8), layout="tight"), out / "evidence.png")
  print(summary(found))
  print(f"wrote {out / 'evidence.json'} and evidence.png")


def _prompts() -> list[str]:
  if flags.FLAGS.prompts_file is None:
    return quality.emoji_captions("validation")
  items = prompt_files.read_prompts(flags.FLAGS.prompts_file)
  return [clean(item.prompt) for item in items]


def _numbers(found: Evidence, count: int) -> dict:
  """Returns JSON; of the entropies only the quantiles."""
  def rounded(x):
    return [None if np.isnan(v) else round(float(v), 4) for v in x] if (
        x.ndim == 1) else [rounded(row) for row in x]

  values = {name: rounded(x) for name, x in vars(found).items()
            if name != "entropies"}
  quantiles = np.quantile(found.entropies, np.linspace(0, 1, 21))
  return {"pictures": count, "thresholds": rounded(np.array(THRESHOLDS)),
          "entropy_quantiles": rounded(quantiles), **values}


def summary(found: Evidence) -> str:
  """Returns a table of the shares that each threshold of CASCADE relaxes."""
  lines = ["| threshold | pairs of alternatives at or above | "
           "alternatives like the slot before |", "|---|---|---|"]
  rows = zip(THRESHOLDS, found.alike_T, found.converged_T, strict=True)
  lines += [f"| {t:.2f} | {a:.3f} | {c:.3f} |" for t, a, c in rows]
  return "\n".join(lines)


def plot(found: Evidence, figure, path: pathlib.Path) -> None:
  """Plots everything into one figure and writes it."""
  (equal, different, slots), (siblings, entropy, spread) = figure.subplots(2, 3)
  reach = found.equal_UW.shape[1] // 2
  extent = (-reach - 0.5, reach + 0.5, found.equal_UW.shape[0] - 0.5, -0.5)
  offsets = ("columns apart", "rows apart")
  maps = (
      (equal, found.equal_UW, "equal tokens", extent, offsets),
      (different, found.different_UW, "different tokens", extent, offsets),
      (slots, found.slots_MM, "the first image", None, ("slot", "slot")),
  )
  for axes, values, title, place, names in maps:
    image = axes.imshow(values, extent=place)
    axes.set_title(f"cosine of states: {title}")
    axes.set(xlabel=names[0], ylabel=names[1])
    figure.colorbar(image, ax=axes, shrink=0.7)
  ranks = np.arange(len(found.siblings_E))
  siblings.plot(ranks, found.siblings_E, "o-", label="with the likeliest")
  siblings.plot(ranks, found.parents_E, "o-", label="with the slot before")
  siblings.set_title("cosine of states: alternatives at a slot")
  siblings.set(xlabel="rank of the alternative", ylabel="mean cosine")
  siblings.legend()
  image = entropy.imshow(found.entropy_RC)
  entropy.set_title("mean entropy of predictions, nats")
  entropy.set(xlabel="column", ylabel="row")
  figure.colorbar(image, ax=entropy, shrink=0.7)
  spread.hist(found.entropies, bins=40)
  spread.set_title("entropy of single predictions")
  spread.set(xlabel="nats", ylabel="slots")
  with replacing(path) as partial:
    figure.savefig(partial, format="png", dpi=150)


def main() -> None:
  """Console entry point."""
  cli.define_config()
  define_flags()
  cli.main(body)
