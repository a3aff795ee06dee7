"""Decoders by the names of the command line: `name:key=value+key=value`."""

from collections.abc import Mapping
import dataclasses
import difflib
import os
import pathlib
import runpy
from typing import Any

from ssd_jax.core.config import UserError, check
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.jacobi.gsd import GSD
from ssd_jax.decoding.jacobi.sjd import SJD, Continuation, Coupled
from ssd_jax.decoding.mtp import MTP
from ssd_jax.decoding.rows.pjd import PJD
from ssd_jax.decoding.rows.ssd import SSD
from ssd_jax.decoding.rows.stair import Exact, Stair
from ssd_jax.decoding.rows.zipar import ZipAR
from ssd_jax.decoding.trees.eagle import Eagle
from ssd_jax.decoding.trees.relaxed import Cascade, Lantern, LanternPP

_PARTS = ("start", "propose", "resolve", "scratch", "settle", "needs",
          "is_lossless")
_LARGEST = 1_000_000  # of a whole number: nothing counts further

DECODERS: dict[str, type] = {
    cls.name: cls
    for cls in (AR, MTP, SJD, Coupled, Continuation, GSD, ZipAR, PJD, SSD,
                Stair, Exact, Eagle, Lantern, LanternPP, Cascade)
}


def parse(text: str, known: Mapping[str, type] = DECODERS) -> Decoder:
  """The decoder that a text such as "ssd:rounds=1+vertical=2" names.

  >>> parse("sjd:window=8+init=repeat_left").window
  8

  Args:
    text: name:key=value+key=value.
    known: Classes by name.

  Raises:
    UserError: on an unknown name or setting, or a value of the wrong kind.
  """
  name, _, rest = text.partition(":")
  if name not in known:
    close = difflib.get_close_matches(name, known, 1)
    hint = f"Did you mean {close[0]!r}?" if close else "Choose one of them."
    raise UserError(
        f"Expected one of {sorted(known)}, got decoder {name!r}. {hint}"
    )
  cls = known[name]
  fields = {f.name: f for f in dataclasses.fields(cls)}
  values = {}
  for part in filter(None, rest.split("+")):
    key, equals, value = part.partition("=")
    if key not in fields or not equals:
      raise UserError(
          f"Expected key=value with a key of {sorted(fields)}, got setting "
          f"{part!r} of decoder {name!r}."
      )
    check(key not in values, key, value, "given once")
    values[key] = _value(name, key, value, fields[key].type)
    is_small = not isinstance(values[key], int) or values[key] <= _LARGEST
    check(is_small, key, value, f"at most {_LARGEST}")
  return cls(**values)


def with_file(file: str | os.PathLike | None) -> dict[str, type]:
  """Classes by name: ours, and those of a user's Python file, which is run.

  Raises:
    UserError: when the file cannot be run or defines no decoder.
  """
  if file is None:
    return DECODERS
  expected = "a Python file with a decoder as docs/extending.md shows"
  if not pathlib.Path(file).is_file():
    raise UserError(f"Expected {expected}, got no file {file}. Check the path.")
  try:
    values = runpy.run_path(os.fspath(file)).values()
  except Exception as error:  # whatever a user's own code raises
    raise UserError(
        f"Expected {expected}, got {type(error).__name__} while running "
        f"{file} ({error}).") from error
  own = {x.name: x for x in values if _is_decoder(x)}
  if not own.keys() - DECODERS.keys():
    raise UserError(
        f"Expected {expected}, got no decoder in {file}. Give a frozen "
        "dataclass a name that is not taken.")
  return DECODERS | {k: v for k, v in own.items() if k not in DECODERS}


def _is_decoder(thing: Any) -> bool:
  return (isinstance(thing, type) and dataclasses.is_dataclass(thing)
          and isinstance(getattr(thing, "name", None), str)
          and not missing_parts(thing))


def missing_parts(thing: Any) -> list[str]:
  """Returns the functions of a `Decoder` that an object or a class lacks."""
  return [x for x in _PARTS if not callable(getattr(thing, x, None))]


def settings(decoder: Decoder) -> dict[str, Any]:
  """The settings of a decoder that differ from its defaults.

  >>> settings(SJD(window=8))
  {'window': 8}
  """
  return {
      f.name: getattr(decoder, f.name)
      for f in dataclasses.fields(decoder)
      if getattr(decoder, f.name) != f.default
  }


def text(decoder: Decoder) -> str:
  """The text that `parse` reads as this decoder.

  >>> text(SJD(window=8))
  'sjd:window=8'
  """
  parts = "+".join(
      f"{key}={','.join(map(str, x)) if isinstance(x, tuple) else x}"
      for key, x in settings(decoder).items())
  return f"{decoder.name}:{parts}" if parts else decoder.name


def _value(name: str, key: str, text: str, kind: Any) -> Any:
  """`text` as a value of the field's type."""
  kinds = kind.split(" | ") if isinstance(kind, str) else (
      getattr(kind, "__args__", None) or (kind,))
  for option in kinds:
    option = getattr(option, "__name__", option)
    try:
      if option in ("None", "NoneType") and text.lower() == "none":
        return None
      if option == "bool" and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
      if option == "int":
        return int(text)
      if option == "float":
        return float(text)
      if option == "str":
        return text
      if option.startswith("tuple"):
        return tuple(int(x) for x in text.split(","))
    except ValueError:
      continue
  names = [getattr(kind, "__name__", str(kind)) for kind in kinds]
  expected = " or ".join(names).replace("NoneType", "none")
  raise UserError(
      f"Expected {expected}, got {key}={text} for decoder {name!r}."
  )
