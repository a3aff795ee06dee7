"""Checkpoints named "hf:ORG/NAME", fetched through huggingface_hub."""

from collections.abc import Iterable, Sequence
import fnmatch
import pathlib

from ssd_jax import tensors
from ssd_jax.config import UserError
from ssd_jax.extras import need

PREFIX = "hf:"


def folder_of(
    source: str, patterns: Sequence[Sequence[str]]
) -> pathlib.Path:
  """The local folder of a source: itself, or what is fetched for it.

  Args:
    source: A path, or hf:ORG/NAME with an optional @REVISION.
    patterns: For each thing that is looked for, its globs in order; the files
      of the first that fits are fetched, and what is there already is not
      fetched again.

  Raises:
    UserError: when the repository is not there, gated, or out of reach.
  """
  if not source.startswith(PREFIX):
    return pathlib.Path(source).expanduser()
  hub = need("huggingface_hub", "hub")
  name, _, revision = source.removeprefix(PREFIX).partition("@")
  if name.count("/") != 1 or not all(name.split("/")):
    raise UserError(f"got source {source!r}, expected hf:ORG/NAME; correct it")
  try:
    return _fetch(hub, name, revision or None, patterns)
  except UserError:
    raise
  except Exception as error:  # of many kinds: HTTP, connection, disk
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(
        f"got no files of {source} ({reason[:160]}), expected a repository "
        "that can be reached; check its name and the network, accept its "
        "terms and set HF_TOKEN if it is gated, or download it and give the "
        "folder") from error


def _fetch(
    hub, name: str, revision: str | None, patterns: Sequence[Sequence[str]]
) -> pathlib.Path:
  present = hub.HfApi().list_repo_files(name, revision=revision)
  fetch = lambda file: pathlib.Path(
      hub.hf_hub_download(name, file, revision=revision))
  root = None
  for choice in patterns:
    for file in _fitting(present, choice):
      path = fetch(file)
      root = path.parents[file.count("/")]
      if path.name in tensors.INDEXES:
        for shard in tensors.index_files(path):
          fetch(str(shard.relative_to(root)))
  if root is None:
    raise UserError(
        f"got {PREFIX}{name} without any of the files looked for, expected a "
        "checkpoint of this --config; check the name")
  return root


def _fitting(present: Iterable[str], choice: Sequence[str]) -> list[str]:
  """The names that the first fitting glob matches."""
  for pattern in choice:
    found = sorted(name for name in present if _matches(name, pattern))
    if found:
      return found
  return []


def _matches(name: str, pattern: str) -> bool:
  if pattern.startswith("**/"):
    tail = pattern.removeprefix("**/")
    depth = tail.count("/") + 1
    return fnmatch.fnmatch("/".join(name.split("/")[-depth:]), tail)
  return (name.count("/") == pattern.count("/")
          and fnmatch.fnmatch(name, pattern))
