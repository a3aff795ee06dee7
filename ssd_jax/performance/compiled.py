"""Collectives and memory moves of a compiled program, read from its text."""

from collections.abc import Sequence
import dataclasses
import math
import re

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all",
         "collective-permute", "collective-broadcast")
_SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALL = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP = re.compile(
    rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
MOVES = ("copy", "transpose", "convert", "dynamic-slice", "pad")
_INSTRUCTION = re.compile(
    r"^\s*(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z\-]*)\((.*)$")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_APPLIED = re.compile(
    r" (?:reduce|reduce-window|sort|scatter|map|all-reduce|reduce-scatter)"
    r"\(.*to_apply=%?([\w.\-]+)")
# What a loop does without starting anything on the device.
_IDLE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
    "conditional", "call", "after-all", "opt-barrier", "partition-id",
    "replica-id"))


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind in one run of a program.

  Attributes:
    kind: HLO operation, such as "all-reduce".
    count: Number of executions.
    bytes: Total bytes of the results on one device.
    group: Largest number of participating devices.
  """

  kind: str
  count: int
  bytes: int
  group: int

  def seconds(self, link: float, hop: float) -> float:
    """Returns the seconds of consecutive rings over one axis.

    Args:
      link: Bandwidth to a neighbour, bytes per second.
      hop: Seconds per step.
    """
    others = self.group - 1
    ways = {"all-reduce": 2 * others / self.group,
            "all-gather": others / self.group,
            "reduce-scatter": others}.get(self.kind, 1.0)
    # Small collectives go around the ring in both directions at once.
    hops = math.ceil(others / 2) * (2 if self.kind == "all-reduce" else 1)
    return self.bytes * ways / link + self.count * hops * hop


def collectives(text: str, devices: int) -> list[Collective]:
  """Returns the collectives of a compiled module, loop iterations included.

  Args:
    text: `compiled.as_text()`.
    devices: Number of devices that the module was compiled for.
  """
  lines = _computations(text)
  runs = _runs(lines)
  each: dict[str, Collective] = {}
  for name, body in lines.items():
    for line in body:
      found, times = _OP.search(line), runs.get(name)
      if not found or not times:
        continue
      # A collective that overlaps other work appears in every step of that work
      # under one channel; it runs as often as its rarest step.
      channel = _CHANNEL.search(line)
      key = channel[1] if channel else line
      size = _bytes(found[1], is_start=bool(found[3]))
      if key not in each or times < each[key].count:
        each[key] = Collective(
            found[2], times, times * size, _group(line, devices))
  totals: dict[str, tuple[int, int, int]] = {}
  for x in each.values():
    count, total, group = totals.get(x.kind, (0, 0, 1))
    totals[x.kind] = (count + x.count, total + x.bytes, max(group, x.group))
  return [Collective(kind, *x) for kind, x in sorted(totals.items())]


@dataclasses.dataclass(frozen=True)
class Move:
  """An array that a loop rewrites to another location, layout or type.

  Attributes:
    kind: One of MOVES.
    bytes: Size of the result.
    name: Name of the instruction.
    count: Executions in an iteration of the outermost loop.
  """

  kind: str
  bytes: int
  name: str
  count: int = 1


def moves_in_loops(text: str, at_least: int) -> list[Move]:
  """Returns the moves in each iteration of any loop that are large enough.

  Args:
    text: `compiled.as_text()`.
    at_least: Smallest result that counts, in bytes.
  """
  lines, found = _computations(text), []
  runs = _runs(lines)
  for name in sorted(_inside_loops(lines)):
    for line in lines[name]:
      move = _move(lines, line)
      if move is not None and move.bytes >= at_least:
        found.append(dataclasses.replace(move, count=runs.get(name, 1)))
  return found


def launches(text: str) -> int:
  """Returns the operations that an iteration of the outermost loop starts.

  On a GPU each is a kernel or a library's call. Inner loops count as often as
  they run, or once if that depends on data.

  Args:
    text: `compiled.as_text()`.
  """
  lines = _computations(text)
  runs, total = _runs(lines), 0
  every = "\n".join(line for body in lines.values() for line in body)
  inner = set(_APPLIED.findall(every))  # of reductions and sorts
  for name in _inside_loops(lines) - inner:
    found = filter(None, map(_INSTRUCTION.match, lines[name]))
    started = sum(x[4] not in _IDLE and not x[4].endswith("-done")
                  for x in found)
    total += runs.get(name, 1) * started
  return total


def _inside_loops(lines: dict[str, list[str]]) -> set[str]:
  """Returns the computations that loops run; bodies of fusions are left out."""
  every = [line for body in lines.values() for line in body]
  open_ = [name for line in every for name in _BODY.findall(line)]
  inside: set[str] = set()
  while open_:
    name = open_.pop()
    if name in inside or name not in lines:
      continue
    inside.add(name)
    for line in lines[name]:
      if " fusion(" in line:  # a fusion writes nothing but its root
        continue
      for several, one in _CALL.findall(line):
        open_ += (several or one).replace("%", "").replace(" ", "").split(",")
  return inside


def _move(lines: dict[str, list[str]], line: str) -> Move | None:
  """Returns the move of an instruction or of its fusion's root, or None."""
  found = _INSTRUCTION.match(line)
  if found is None:
    return None
  _, name, shape, kind, rest = found.groups()
  if kind == "fusion":
    called = re.search(r"calls=%?([\w.\-]+)", rest)
    kind = _root_kind(lines.get(called[1], ())) if called else kind
  return Move(kind, _bytes(shape, False), name) if kind in MOVES else None


def _root_kind(body: Sequence[str]) -> str:
  """Returns the operation whose result a computation returns."""
  known = {found[2]: found for found in map(_INSTRUCTION.match, body) if found}
  at = next((x for x in known.values() if x[1]), None)
  while at is not None and at[4] in ("bitcast", "reshape"):
    operand = re.search(r"%([\w.\-]+)", at[5])
    at = known.get(operand[1]) if operand else None
  return at[4] if at is not None else ""


def _computations(text: str) -> dict[str, list[str]]:
  found: dict[str, list[str]] = {}
  name = None
  for line in text.splitlines():
    start = _COMPUTATION.match(line)
    if start:
      name = "ENTRY" if line.startswith("ENTRY") else start[1]
      found[name] = []
    elif name and line.startswith("}"):
      name = None
    elif name:
      found[name].append(line)
  return found


def _runs(lines: dict[str, list[str]]) -> dict[str, int]:
  """Returns how often each computation runs."""
  runs, open_ = {"ENTRY": 1}, ["ENTRY"]
  while open_:
    name = open_.pop()
    for line in lines.get(name, ()):
      times = runs[name] * _turns(line, lines)
      for several, one in _CALL.findall(line):
        for called in (several or one).replace("%", "").split(","):
          called = called.strip()
          if times > runs.get(called, 0) and called in lines:
            runs[called] = times
            open_.append(called)
  return runs


def _turns(line: str, lines: dict[str, list[str]]) -> int:
  """Returns how often an instruction's callee runs; 1 if it depends on data.

  Programs for TPUs do not state trip counts; there the condition of a loop
  compares one counter, which starts at 0, with one constant.
  """
  trips = _TRIPS.search(line)
  if trips or " while(" not in line:
    return int(trips[1]) if trips else 1
  named = _CONDITION.search(line)
  condition = "\n".join(lines.get(named[1], ()) if named else ())
  limits = _LIMIT.findall(condition)
  counted = condition.count(" compare(") == 1 and "direction=LT" in condition
  return int(limits[0]) if counted and len(limits) == 1 else 1


def _bytes(shapes: str, is_start: bool) -> int:
  sizes = [
      math.prod(int(n) for n in dims.split(",") if n) * _SIZES.get(
          kind, np.dtype("int8").itemsize if kind.endswith("8") else 4)
      for kind, dims in _SHAPE.findall(shapes)]
  # An asynchronous collective lists its operand and its result.
  return max(sizes, default=0) if is_start else sum(sizes)


def _group(line: str, devices: int) -> int:
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  if listed:
    return len(listed[1].split(","))
  named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
  if named:
    sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
    return math.prod(int(sizes[x.strip()]) for x in named[2].split(","))
  tiled = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
  return int(tiled[1]) if tiled else devices
