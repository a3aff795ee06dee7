"""Names of tensors, freed of what trainers put around them.

DistributedDataParallel, DeepSpeed, FSDP, torch.compile and checkpointing each
add a part to names, anywhere in them; Lightning and others put a model under a
prefix of its own.
"""

from collections.abc import Collection, Mapping

from ssd_jax.convert.checkpoint_files import Checkpoint
from ssd_jax.core.config import UserError

_WRAPPERS = frozenset((
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
    "_fpw_module", "_checkpoint_wrapped_module"))


def unwrapped(found: Checkpoint, expected: Collection[str]) -> Checkpoint:
  """Returns a checkpoint with the names that a recipe expects.

  Args:
    found: The checkpoint as it was saved.
    expected: Names of the tensors that the recipe uses.

  Raises:
    UserError: Two names become one, or the model is there more than once.
  """
  names: dict[str, str] = {}
  for name in found.tensors:
    plain = name if name in expected else ".".join(
        part for part in name.split(".") if part not in _WRAPPERS)
    if plain in names:
      raise UserError(
          f"Expected each tensor once, got {names[plain]!r} and {name!r} in "
          f"{found.tensors[name].file.name}. Keep one of them.")
    names[plain] = name
  prefix = _prefix(names, expected, found)
  return Checkpoint(
      {plain.removeprefix(prefix): found.tensors[name]
       for plain, name in names.items() if plain.startswith(prefix)},
      found.files)


def _prefix(
    names: Mapping[str, str], expected: Collection[str], found: Checkpoint
) -> str:
  """Returns the prefix under which all expected names are, "" if none is."""
  anchor = max(expected, key=lambda name: (len(name), name))
  at = [name.removesuffix(anchor) for name in names
        if f".{name}".endswith(f".{anchor}")]
  whole = [prefix for prefix in at
           if all(prefix + name in names for name in expected)]
  if "" in whole:
    return ""
  if len(whole) > 1:
    raise UserError(
        f"Expected one model, got {found.files[0].name} with a model under "
        f"each of the prefixes {', '.join(map(repr, sorted(whole)))}. Save "
        "the one you mean alone.")
  # Under the one prefix that there is, the tensors that differ are reported.
  return whole[0] if whole else at[0] if len(at) == 1 else ""
