"""Body of infer.convert: a published checkpoint becomes a model folder."""


from absl import flags, logging

from ssd_jax.cli import run as cli
from ssd_jax.convert import convert, hub, registry
from ssd_jax.convert.recipes import Recipe
from ssd_jax.core.config import UserError
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage.files import user_path


def define_flags() -> None:
  """Defines the command's flags."""
  where = "a folder or hf:ORG/NAME"
  flags.DEFINE_string("source", None, f"The trunk's checkpoint: {where}.")
  flags.DEFINE_string("out", None, "The model folder to be made.")
  for name in ("vq", "text_encoder", "tokenizer"):
    flags.DEFINE_string(
        name, None, f"The {registry.PARTS[name]}'s files: {where}; default: in "
        "--source."
        + (" `none` leaves it out: prompts are then files of its features."
           if name == "text_encoder" else ""))
  flags.DEFINE_enum(
      "dtype", "bfloat16", sorted(convert.DTYPES),
      "Of the stored trunk; image tokenizers stay in float32.")


def body() -> None:
  """Converts as the flags say."""
  logging.set_verbosity(logging.ERROR)  # orbax warns of empty checkpoints
  values = flags.FLAGS
  recipe = registry.recipe_of(values.config)
  for name in ("source", "out"):
    if not getattr(values, name):
      raise UserError(f"Expected a folder, got no --{name}. Give one.")
  given = {name: getattr(values, name) for name in registry.PARTS
           if getattr(values, name)}
  if given.get("text_encoder") == "none":
    del given["text_encoder"]
    recipe = recipe.without_text_encoder()
  _check_places(recipe, given)
  folders = registry.fetched(
      recipe, {name: hub.Location(source) for name, source in given.items()})
  job = convert.open_job(recipe, folders, values.dtype)
  out = user_path(values.out)
  if convert.existing_report(job, out) is not None:
    print(f"{out} already holds this conversion; nothing to do")
    return
  with Bar(total=job.size, unit="B", unit_scale=True,
           desc="converting") as bar:
    report = convert.convert(job, out, bar.update)
  counts = ", ".join(f"{name} {count:,}"
                     for name, count in report["parameters"].items())
  print(f"wrote {out}: {counts} parameters, {report['bytes'] / 1e9:.2f} GB, "
        f"{len(report['arrays'])} pieces with checksums in "
        f"{out / 'report.json'}")


def _check_places(recipe: Recipe, given: dict[str, str]) -> None:
  """Raises UserError on a flag that this family has no use for."""
  known = {"source", *(part.flag for part in recipe.parts)}
  known |= {"tokenizer"} if recipe.tokenizer else set()
  for name in given:
    if name not in known:
      raise UserError(
          f"Expected only {', '.join(sorted('--' + flag for flag in known))} "
          f"for {recipe.family}, got --{name} {given[name]}. Leave it out.")


def main() -> None:
  """Console entry point."""
  cli.define_config()
  define_flags()
  cli.main(body)
