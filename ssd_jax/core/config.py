"""User errors, range checks, and frozen settings made from a ConfigDict.

Entry points call `from_config_dict(SomeConfig, config.some)`; the code below
them does not use ConfigDicts.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
  from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


_LARGEST = 2**31 - 1


class UserError(ValueError):
  """An error that the user can fix; one line: "Expected X, got Y. Do Z."."""


def check(ok: bool, name: str, got: Any, expected: str) -> None:
  """Checks a setting.

  Args:
    ok: Whether the value is valid.
    name: Name of the setting.
    got: Its value.
    expected: Description of valid values; completes "to be".

  Raises:
    UserError: `ok` is False.
  """
  if not ok:
    shown = " ".join(str(got).split())
    raise UserError(
        f"Expected {name} to be {expected}, got {name}={shown}.")


def check_sizes(config: "DataclassInstance", *may_be_zero: str) -> None:
  """Checks the numbers of a settings class: whole ones >= 1, others > 0.

  Args:
    config: The dataclass.
    *may_be_zero: Fields of whole numbers whose 0 has a meaning.

  Raises:
    UserError: A number is out of range or of another kind.
  """
  for field in dataclasses.fields(config):
    name, value = field.name, getattr(config, field.name)
    if field.type is int:
      least = 0 if name in may_be_zero else 1
      check(type(value) is int and least <= value <= _LARGEST, name, value,
            f"a whole number >= {least}, below 2^31")
    elif field.type is float:
      check(type(value) in (int, float) and 0 < value < math.inf, name, value,
            "a number > 0")
    elif field.type == tuple[int, ...]:
      check(isinstance(value, tuple) and all(
          type(x) is int and 0 <= x <= _LARGEST for x in value), name, value,
          "whole numbers >= 0")


def from_config_dict(cls: type[T], values: Any) -> T:
  """Makes a frozen dataclass from a ConfigDict with exactly its fields.

  Args:
    cls: The dataclass.
    values: The ConfigDict, or another mapping.

  Raises:
    UserError: A key is unknown or missing, or a value is out of range.
  """
  if not hasattr(values, "keys"):
    raise UserError(
        f"Expected settings of {cls.__name__}, got {str(values)[:40]!r}.")
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if not hasattr(values, "keys"):
    raise UserError(f"Expected settings of {cls.__name__} by name, got "
                    f"{values!r:.60}.")
  unknown = sorted(set(values) - set(fields))
  if unknown:
    raise UserError(
        f"Expected a setting of {cls.__name__}, one of {sorted(fields)}, got "
        f"unknown setting {unknown[0]!r}. Remove or rename it."
    )
  kwargs = {}
  for name in values:
    value, kind = values[name], fields[name].type
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
      value = from_config_dict(kind, value)
    elif isinstance(value, (list, tuple)):
      value = tuple(value)
    kwargs[name] = value
  try:
    return cls(**kwargs)
  except TypeError as error:
    raise UserError(
        f"Expected all settings of {cls.__name__}, got {error}."
    ) from error


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon with warm-up and cosine decay.

  Attributes:
    kind: "adamw", or "muon" for a trunk: Muon for the matrices of its layers,
      scaled to AdamW's step size (Liu et al. 2025, arXiv:2502.16982), AdamW for
      all other parameters.
    learning_rate: Peak learning rate, reached after `warmup_steps`.
    final_learning_rate: Learning rate at the last step.
    warmup_steps: Number of linear warm-up steps.
    b1: First-moment decay.
    b2: Second-moment decay.
    weight_decay: Decoupled weight decay, for matrices only.
    clip: Largest global gradient norm.
    ema: Decay of the averaged weights that are evaluated and exported; 0
      disables averaging.
  """

  kind: str = "adamw"
  learning_rate: float = 1e-3
  final_learning_rate: float = 1e-5
  warmup_steps: int = 100
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.01
  clip: float = 1.0
  ema: float = 0.0

  def __post_init__(self):
    check(self.kind in ("adamw", "muon"), "kind", self.kind, "adamw or muon")
    check(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
    check(self.clip > 0, "clip", self.clip, "> 0")
    for name in ("b1", "b2", "ema"):
      value = getattr(self, name)
      check(0 <= value < 1, name, value, "in [0, 1)")
    for name in ("final_learning_rate", "weight_decay"):
      value = getattr(self, name)
      check(value >= 0, name, value, ">= 0")
    check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, ">= 0")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Settings of every training loop.

  Attributes:
    steps: Total number of optimiser steps.
    batch: Examples per step, over all devices.
    accumulate: Number of parts of a batch whose gradients are accumulated, if a
      batch does not fit in memory.
    log_every: Steps between log lines.
    eval_every: Steps between evaluations.
    save_every: Steps between checkpoints.
    keep: Number of checkpoints to keep.
    seed: Seed of initialisation, data order and noise.
  """

  steps: int = 1000
  batch: int = 16
  accumulate: int = 1
  log_every: int = 20
  eval_every: int = 500
  save_every: int = 200
  keep: int = 2
  seed: int = 0

  def __post_init__(self):
    for name in ("steps", "batch", "accumulate", "log_every", "eval_every",
                 "save_every", "keep"):
      check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
    check(self.batch % self.accumulate == 0, "accumulate", self.accumulate,
          f"a divisor of the batch of {self.batch}")
