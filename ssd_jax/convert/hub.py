"""Locations of checkpoints: local folders, or "hf:ORG/NAME" on the hub."""

from collections.abc import Iterable, Sequence
import dataclasses
import fnmatch
import functools
import pathlib
from types import ModuleType

from ssd_jax.convert import checkpoint_files
from ssd_jax.core.config import UserError
from ssd_jax.core.extras import need
from ssd_jax.storage.files import user_path

PREFIX = "hf:"
_PATIENCE = 30.0  # seconds


@dataclasses.dataclass(frozen=True)
class Location:
  """The location of a checkpoint's files.

  Attributes:
    source: Path of a folder or file, or hf:ORG/NAME with an optional @REVISION.
  """

  source: str

  @property
  def is_remote(self) -> bool:
    """Whether files are downloaded."""
    return self.source.startswith(PREFIX)

  @property
  def path(self) -> pathlib.Path:
    """Path of a local source."""
    return user_path(self.source)

  def has(self, patterns: Sequence[str]) -> bool:
    """Returns whether a file matches a glob, without downloading anything."""
    if self.is_remote:
      return bool(_first_matches(self._listing[0], patterns))
    folder = self.path if self.path.is_dir() else self.path.parent
    return bool(checkpoint_files.matching(folder, patterns))

  def folder(self, patterns: Sequence[Sequence[str]]) -> pathlib.Path:
    """Returns the local folder; downloads the needed files of a remote source.

    Args:
      patterns: For each needed item, its globs in order. The files that match
        the first matching glob are downloaded, unless they are already local.

    Raises:
      UserError: The repository is missing, gated or unreachable.
    """
    if not self.is_remote:
      return self.path
    present, is_offline = self._listing
    try:
      return self._fetch(present, is_offline, patterns)
    except UserError:
      raise
    except Exception as error:  # of many types: HTTP, connection, disk
      raise self._unreachable(error) from error

  @functools.cached_property
  def _listing(self) -> tuple[list[str], bool]:
    """Names of the files, and whether only cached files are available."""
    (name, revision), hub = self._named, self._hub
    try:
      # Unlike a listing of the tree, this does not try again for half a minute.
      found = hub.HfApi().model_info(name, revision=revision, timeout=_PATIENCE)
      return [file.rfilename for file in found.siblings], False
    except Exception as error:  # of many types; cached files may suffice
      try:
        root = pathlib.Path(hub.snapshot_download(
            name, revision=revision, local_files_only=True))
      except Exception:
        raise self._unreachable(error) from error
      return [p.relative_to(root).as_posix() for p in root.rglob("*")
              if p.is_file()], True

  def _fetch(
      self, present: list[str], is_offline: bool,
      patterns: Sequence[Sequence[str]],
  ) -> pathlib.Path:
    name, revision = self._named
    fetch = lambda file: pathlib.Path(self._hub.hf_hub_download(
        name, file, revision=revision, local_files_only=is_offline))
    root = None
    for choice in patterns:
      for file in _first_matches(present, choice):
        path = fetch(file)
        root = path.parents[file.count("/")]
        if path.name in checkpoint_files.INDEXES:
          for shard in checkpoint_files.index_files(path):
            fetch(str(shard.relative_to(root)))
    if root is None:
      raise UserError(
          f"Expected a checkpoint of this --config, got {self.source} without "
          "any of the expected files. Check the name.")
    return root

  @property
  def _hub(self) -> ModuleType:
    return need("huggingface_hub", "hub")

  @property
  def _named(self) -> tuple[str, str | None]:
    """The repository ORG/NAME, and the revision or None."""
    name, _, revision = self.source.removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
      raise UserError(
          f"Expected hf:ORG/NAME, got source {self.source!r}.")
    return name, revision or None

  def _unreachable(self, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"Expected a reachable repository, got no files of {self.source} "
        f"({reason[:160]}). Check its name and the network, accept its terms "
        "and set HF_TOKEN if it is gated, or download it and pass the folder.")


def _first_matches(present: Iterable[str], choice: Sequence[str]) -> list[str]:
  """Returns the names that match the first matching glob."""
  for pattern in choice:
    found = checkpoint_files.published(
        name for name in present if _matches(name, pattern))
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
