"""What a conversion checks before it writes anything."""

import dataclasses
import pathlib
import re
import shutil
import tempfile

import numpy as np

from ssd_jax.convert.checkpoint_files import Checkpoint
from ssd_jax.convert.recipes import Part, Recipe
from ssd_jax.convert.tensors import SafeTensor, Tensor
from ssd_jax.core.config import UserError
from ssd_jax.core.extras import MissingExtra

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_SHOWN = 6  # names listed in an error
_SIGNATURES = {  # name of a tensor that only this family has -> family
    "layers.0.attention.wqkv.weight": "llamagen",
    "gen_embed.weight": "janus",
    "layers.0.attention.wq.weight": "anole",
    "model.layers.0.self_attn.q_norm.weight": "lumina or anole:hf",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "T5",
    "prior_token_embedding.weight": "GLM-Image's diffusion transformer",
    "decoder.time_conv.0.conv.conv.weight": "an Emu3 tokenizer",
}


class BadWeights(UserError):
  """Numbers that no conversion should keep."""


def check_family(recipe: Recipe, part: Part, found: Checkpoint) -> None:
  """Raises UserError if most tensors of a part are missing, and not as in a
  checkpoint of which some files are missing."""
  expected, present = part.names, set(found.tensors)
  if len(expected - present) <= len(expected) // 2 or (
      present and present <= expected):
    return
  guess = [family for name, family in _SIGNATURES.items()
           if name in found.tensors and name not in expected]
  looks = f" that looks like {guess[0]}" if guess else ""
  has = min(found.tensors, default="none")
  raise UserError(
      f"Expected a checkpoint of {recipe.family} with tensors such as "
      f"{min(expected)}, got a checkpoint{looks} in {found.files[0].name} with "
      f"tensors such as {has}. Choose the --config of its family, or another "
      "folder.")


def check_table(part: Part, found: Checkpoint) -> None:
  """Raises UserError if tensors are missing, unknown or of the wrong shape."""
  expected = {s.name: (s.shape, *s.others)
              for row in part.table.rows for s in row.sources}
  ignored = [re.compile(pattern) for pattern in part.table.ignored]
  present = set(found.tensors)
  unknown = sorted(name for name in present - set(expected)
                   if not any(p.fullmatch(name) for p in ignored))
  problems = {
      "missing": sorted(set(expected) - present),
      "unknown": unknown,
      "misshaped": sorted(
          f"{name} {found.tensors[name].shape} for {shapes[0]}"
          for name, shapes in expected.items()
          if name in present and found.tensors[name].shape not in shapes),
  }
  found_problems = [
      _listing(kind, items) for kind, items in problems.items() if items]
  if found_problems:
    file = found.tensors[unknown[0]].file if unknown else found.files[0]
    used = {found.tensors[name].file for name in present & set(expected)}
    advice = "Choose the variant of --config that matches the checkpoint"
    copies = {name.partition(".")[0] for name in unknown if
              name.partition(".")[2] in expected}
    if file not in used and len(found_problems) == 1:
      advice = f"Take {file.name} out of the folder"
    elif unknown and copies == {name.partition(".")[0] for name in unknown}:
      advice = f"Save the model without what is under {min(copies)!r}"
    elif present < set(expected):
      advice = "Download the files that are missing, or choose the variant of "
      advice += "--config that matches the checkpoint"
    raise UserError(
        "Expected every tensor of this family and variant once, got "
        f"{file.name} with {'; '.join(found_problems)}. {advice}.")


def _listing(kind: str, items: list[str]) -> str:
  rest = len(items) - _SHOWN
  more = f" and {rest} more" if rest > 0 else ""
  return f"{len(items)} {kind} tensors ({', '.join(items[:_SHOWN])}{more})"


def check_dtypes(part: Part, found: Checkpoint) -> None:
  """Raises UserError if a tensor that is used holds no ordinary floats."""
  for name in sorted(part.names):
    tensor = found.tensors[name]
    if tensor.kind not in _FLOATS:
      raise UserError(
          f"Expected weights in one of {', '.join(_FLOATS)}, got {name} in "
          f"{tensor.kind} in {tensor.file}. Choose the checkpoint that was not "
          "quantised.")


def check_finite(
    value: np.ndarray, read: list[np.ndarray],
    tensors: list[Tensor | SafeTensor], names: list[str],
) -> None:
  """Raises UserError unless all numbers of a converted piece are finite.

  Args:
    value: The piece, in the dtype that is stored.
    read: The published arrays that it is made of.
    tensors: Where these are.
    names: Their names.
  """
  if np.isfinite(value).all():
    return
  bad = [i for i, x in enumerate(read) if not np.isfinite(x).all()]
  i = bad[0] if bad else 0
  kind = "nan or inf" if bad else f"numbers too large for {value.dtype}"
  raise BadWeights(
      f"Expected finite weights, got {kind} in {names[i]} in "
      f"{tensors[i].file}. Download the file again, or choose another "
      "checkpoint of the run.")


def check_tokenizer(
    recipe: Recipe, assets: tuple[pathlib.Path, ...]
) -> None:
  """Raises UserError unless the tokenizer's files spell a text.

  Without the extra that reads them, they are not tried.
  """
  if not assets or recipe.speller is None:
    return
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name) / "tokenizer"
    folder.mkdir()
    for file in assets:
      shutil.copyfile(file, folder / file.name)
    try:
      dataclasses.replace(recipe.speller, folder=folder.parent).check_text()
    except MissingExtra:
      return
    except UserError as error:
      raise UserError(
          str(error).replace(str(folder), str(assets[0].parent))) from error
