"""Body of infer.compare: our loops beside transformers', in one run.

  --out/results.json   every figure
  --out/table.md       the same for people
"""

from collections.abc import Callable, Sequence
import dataclasses
import platform
from typing import Any

from absl import flags
import jax
import numpy as np

from ssd_jax import __version__
from ssd_jax.cli import common, run as cli
from ssd_jax.core.config import UserError, check
from ssd_jax.core.extras import need
from ssd_jax.decoding import registry
from ssd_jax.performance.transformers_baseline import (
  Contender,
  Generation,
  OurDecoders,
  Setting,
  TransformersBaseline,
  race,
)
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage.files import write_json, write_text

common.define_flags(
    "seed", "batch", "out")

_SIZES = {  # layers, width, head_dim, vocab, dtype
    "100m": (12, 768, 64, 8192, "float32"),
    "300m": (24, 1024, 64, 8192, "float32"),
    "7b": (32, 4096, 128, 8192, "bfloat16"),
}
_AR, _STATIC, _COMPILED = (
    "our ar", "transformers, static cache", "transformers, compiled")
_WORDS = """
All generate the same number of tokens with one stream, in turns, on one
machine. *per token*: the whole generation, the prompt's pass included, over the
tokens of an image. *ratio*: theirs over our AR's, above 1 our AR is faster;
quartiles over rounds. *greedy tokens*: leading tokens of each image equal to
our AR's.
"""
_LOOPS = """
*per pass*: a whole generation at temperature 1 over its passes, *ratio*: over
our AR's pass of the same round.
"""


def define_flags() -> None:
  """Defines the command's own flags."""
  flags.DEFINE_enum("size", "100m", list(_SIZES), "Trunk size, in parameters.")
  flags.DEFINE_integer("layers", None, "Layers; default: by --size.")
  flags.DEFINE_integer("width", None, "Width; default: by --size.")
  flags.DEFINE_integer("vocab", None, "Vocabulary size; default: by --size.")
  flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                    "Type of weights and activations; default: by --size.")
  flags.DEFINE_integer("tokens", 256, "Tokens per image; a square number.")
  flags.DEFINE_integer("prompt_tokens", 16, "Tokens per prompt.")
  flags.DEFINE_integer("rounds", 5, "Repetitions of each measurement.")
  flags.DEFINE_string(
      "loops", "sjd,zipar,pjd", "Decoders whose pass is compared with ar's, "
      "separated by commas: NAME or NAME:key=value+key=value.")


def body() -> None:
  """Runs the comparison of the flags."""
  if flags.FLAGS["config"].present:
    raise UserError("Expected none: the trunk is that of --size, got "
                    "--config. Leave it out.")
  setting, rounds = _setting(), flags.FLAGS.rounds
  check(rounds >= 1, "rounds", rounds, ">= 1")
  labels = [x.strip() for x in flags.FLAGS.loops.split(",") if x.strip()]
  loops = [registry.parse(label) for label in labels]
  for module in ("torch", "transformers"):
    need(module, "parity")
  out = common.writable_folder(flags.FLAGS.out or "compare")
  theirs = TransformersBaseline(setting)
  ours = OurDecoders(setting, theirs)
  missing = theirs.compile()
  contenders = [
      Contender(_AR, lambda: ours.generate(registry.parse("ar"), 0.0)),
      Contender(_STATIC, lambda: theirs.generate(False))]
  if missing is None:
    contenders.append(Contender(_COMPILED, lambda: theirs.generate(True)))
  contenders += [
      Contender(label, _loop(ours, decoder), ours.queries(decoder))
      for label, decoder in zip(labels, loops, strict=True)]
  total = (1 + rounds) * len(contenders)
  with Bar(total=total, unit="run") as bar:
    def on_step(label):
      bar.set_description(label)
      bar.update()

    found = race(contenders, rounds, on_step)
  _write(out, setting, _rows(contenders, found, setting, missing))


def _setting() -> Setting:
  """Returns the setting of the flags."""
  values = flags.FLAGS
  layers, width, head_dim, vocab, dtype = _SIZES[values.size]
  given = lambda value, default: default if value is None else value
  width = given(values.width, width)
  return Setting(
      given(values.layers, layers), width, min(head_dim, width),
      given(values.vocab, vocab), values.tokens, values.prompt_tokens,
      1 if flags.FLAGS.batch is None else flags.FLAGS.batch,
      values.dtype or dtype, flags.FLAGS.seed)


def _loop(ours: OurDecoders, decoder: Any) -> Callable[[], Generation]:
  return lambda: ours.generate(decoder, 1.0)


def _rows(
    contenders: Sequence[Contender], found: Sequence[Sequence[Generation]],
    setting: Setting, missing: str | None,
) -> list[dict]:
  """Returns the rows of results.json."""
  ar, rows = found[0], []
  for who, drawn in zip(contenders, found, strict=True):
    is_loop = who.label not in (_AR, _STATIC, _COMPILED)
    per = [d.passes for d in drawn] if is_loop else [setting.tokens] * len(ar)
    ms = np.array([d.seconds * 1e3 for d in drawn]) / per
    ar_ms = np.array([d.seconds * 1e3 / setting.tokens for d in ar])
    equal = None if is_loop else _equal(drawn[0].tokens, ar[0].tokens)
    rows.append(dict(
        name=who.label, compares="pass" if is_loop else "token",
        queries=who.queries, milliseconds=_quartiles(ms),
        ratio=_quartiles(ms / ar_ms), passes=float(np.mean(
            [d.passes for d in drawn])),
        equal_tokens=equal, unavailable=None))
  if missing is not None:
    rows.insert(2, dict(
        name=_COMPILED, compares="token", queries=1, milliseconds=None,
        ratio=None, passes=None, equal_tokens=None, unavailable=missing))
  return rows


def _equal(tokens: np.ndarray, others: np.ndarray) -> float:
  """Returns the share of leading tokens that are equal, over the images."""
  return float(np.cumprod(tokens == others, axis=1).mean())


def _quartiles(x: np.ndarray) -> dict[str, float]:
  names = ("q25", "median", "q75")
  return dict(zip(names, np.quantile(x, [0.25, 0.5, 0.75]).tolist()))


def table(rows: Sequence[dict], compares: str) -> str:
  """Returns Markdown of the rows that compare a "token" or a "pass"."""
  heads = f"| | queries | passes | ms per {compares} [quartiles] | ratio "
  heads += "[quartiles] |" + (" greedy tokens |" if compares == "token" else "")
  lines = [heads, "|---" * (heads.count("|") - 1) + "|"]
  for row in rows:
    if row["compares"] != compares:
      continue
    if row["unavailable"] is not None:
      lines.append(f"| {row['name']} | not available: {row['unavailable']} |"
                   + " - |" * (heads.count("|") - 3))
      continue
    cells = [row["name"], str(row["queries"]), f"{row['passes']:.0f}",
             _spread(row["milliseconds"], ".3g"), _spread(row["ratio"], ".2f")]
    if compares == "token":
      equal = row["equal_tokens"]
      cells.append("equal" if equal == 1 else f"equal up to {equal:.0%}")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def _spread(x: dict[str, float], form: str) -> str:
  return f"{x['median']:{form}} [{x['q25']:{form}}, {x['q75']:{form}}]"


def _write(out: Any, setting: Setting, rows: list[dict]) -> None:
  """Writes and prints the report."""
  torch, transformers = need("torch", "parity"), need("transformers", "parity")
  device, cfg = jax.devices()[0], setting.trunk
  weights = cfg.n_layers * (4 * cfg.d_model**2 + 3 * cfg.d_model * cfg.d_ff)
  weights += 2 * cfg.vocab_in * cfg.d_model
  versions = dict(
      ssd_jax=__version__, jax=jax.__version__, torch=torch.__version__,
      transformers=transformers.__version__, python=platform.python_version())
  head = (f"{weights / 1e6:.0f}M parameters ({cfg.n_layers} layers of width "
          f"{cfg.d_model}), {setting.dtype}, {setting.tokens} tokens, batch "
          f"{setting.batch}, {flags.FLAGS.rounds} rounds, {device.platform} "
          f"({device.device_kind}), {torch.get_num_threads()} threads.\n\n")
  text = head + table(rows, "token") + _WORDS
  if any(row["compares"] == "pass" for row in rows):
    text += "\n" + table([rows[0] | {"compares": "pass"}] + rows, "pass")
    text += _LOOPS
  write_text(out / "table.md", text)
  write_json(out / "results.json", dict(
      device=f"{device.platform} {device.device_kind}", versions=versions,
      config=dict(dataclasses.asdict(setting), parameters=weights,
                  rounds=flags.FLAGS.rounds), rows=rows))
  print(text)
  print(f"wrote {out / 'results.json'}")


def main() -> None:
  """Console entry point."""
  cli.define_config()
  define_flags()
  cli.main(body)
