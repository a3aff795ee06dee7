"""Decoders by the names of the command line: `name:key=value+key=value`."""

import dataclasses
import difflib
from typing import Any

from ssd_jax.config import UserError
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.engine import Decoder
from ssd_jax.decoding.gsd import GSD
from ssd_jax.decoding.jacobi import SJD, Continuation, Coupled
from ssd_jax.decoding.mtp import MTP
from ssd_jax.decoding.pjd import PJD
from ssd_jax.decoding.relaxed import Cascade, Lantern, LanternPP
from ssd_jax.decoding.ssd import SSD
from ssd_jax.decoding.stair import Exact, Stair
from ssd_jax.decoding.tree import Eagle
from ssd_jax.decoding.zipar import ZipAR

DECODERS: dict[str, type] = {
    cls.name: cls
    for cls in (AR, MTP, SJD, Coupled, Continuation, GSD, ZipAR, PJD, SSD,
                Stair, Exact, Eagle, Lantern, LanternPP, Cascade)
}


def parse(text: str) -> Decoder:
  """The decoder that a text such as "ssd:rounds=1+lag=1" names.

  Raises:
    UserError: on an unknown name or setting, or a value of the wrong kind.
  """
  name, _, rest = text.partition(":")
  if name not in DECODERS:
    close = difflib.get_close_matches(name, DECODERS, 1)
    hint = f"did you mean {close[0]!r}?" if close else "choose one of them"
    raise UserError(
        f"got decoder {name!r}, expected one of {sorted(DECODERS)}; {hint}"
    )
  cls = DECODERS[name]
  fields = {f.name: f for f in dataclasses.fields(cls)}
  values = {}
  for part in filter(None, rest.split("+")):
    key, equals, value = part.partition("=")
    if key not in fields or not equals:
      raise UserError(
          f"got setting {part!r} of decoder {name!r}, expected key=value with "
          f"a key of {sorted(fields)}; correct it"
      )
    values[key] = _value(name, key, value, fields[key].type)
  return cls(**values)


def settings(decoder: Decoder) -> dict[str, Any]:
  """The settings of a decoder that differ from its defaults."""
  return {
      f.name: getattr(decoder, f.name)
      for f in dataclasses.fields(decoder)
      if getattr(decoder, f.name) != f.default
  }


def _value(name: str, key: str, text: str, kind: Any) -> Any:
  """`text` as a value of the field's type."""
  kinds = kind.split(" | ") if isinstance(kind, str) else (
      getattr(kind, "__args__", None) or (kind,))
  for option in kinds:
    option = getattr(option, "__name__", option)
    try:
      if option in ("None", "NoneType") and text == "none":
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
  expected = " or ".join(str(getattr(k, "__name__", k)) for k in kinds)
  raise UserError(
      f"got {key}={text} for decoder {name!r}, expected {expected}; correct it"
  )
