"""Arguments of `Pipeline.generate` and `stream`, checked before any work."""

from collections.abc import Iterable, Mapping, Sequence
import operator
from typing import Any

import numpy as np

from ssd_jax.core.config import UserError, check
from ssd_jax.core.grid import Grid
from ssd_jax.core.protocols import Decoder
from ssd_jax.core.types import Params
from ssd_jax.core.weights import leaves_by_path
from ssd_jax.decoding import registry

_LARGEST = 10_000  # guidance or temperature
_MOST = 1_000_000  # images per prompt, or in a batch
_INDICES = 2**31  # of images: they are int32


def check_call(
    prompts: Iterable[str], num_images: int, seed: int, batch: int,
    **listeners: Any,
) -> None:
  """Raises UserError if a number is out of range or there is no prompt.

  Args:
    prompts: Read only if they are a sequence.
    num_images: Images per prompt.
    seed: Seed of the noise.
    batch: Images decoded together.
    **listeners: Callbacks, or None.
  """
  if isinstance(prompts, (str, bytes)):
    raise UserError(f"Expected a list of texts, got the text {prompts[:40]!r} "
                    "as prompts. Put it in a list.")
  check(isinstance(prompts, Iterable), "prompts", _short(prompts),
        "a list of texts")
  if isinstance(prompts, Sequence):
    check(len(prompts) > 0, "prompts", prompts, "at least one")
  numbers = dict(num_images=num_images, batch=batch, seed=seed)
  for name, value in numbers.items():
    check(_is_whole(value), name, _short(value), "a whole number")
    if name != "seed":
      check(value >= 1, name, value, ">= 1")
      check(value <= _MOST, name, value, f"at most {_MOST}")
  check(0 <= seed < 2**32, "seed", seed, "in [0, 2^32)")
  for name, function in listeners.items():
    check(function is None or callable(function), name, _short(function),
          "a function")


def text_of(prompt: str | int) -> str:
  """Returns a prompt as text; a class may be given as a number.

  Raises:
    UserError: if it is neither.
  """
  if isinstance(prompt, str):
    return prompt
  if not _is_whole(prompt):
    raise UserError(f"Expected a text, got the prompt {_short(prompt)}. Write "
                    "what to generate in words.")
  return str(prompt)


def texts_of(prompts: Iterable[str | int], num_images: int) -> list[str]:
  """Returns the prompt of each image.

  Raises:
    UserError: if there is none, or a prompt is not a text.
  """
  texts = [text_of(prompt) for prompt in prompts for _ in range(num_images)]
  check(bool(texts), "prompts", "none", "at least one")
  return texts


def decoder_of(given: Decoder | str) -> Decoder:
  """Returns a decoder, parsed if it is given as text.

  Raises:
    UserError: if it is not a decoder.
  """
  if isinstance(given, str):
    return registry.parse(given)
  if isinstance(given, type):
    raise UserError("Expected a decoder instance, got the class "
                    f"{given.__name__} as decoder. Write {given.__name__}().")
  if type(given).__hash__ is None:
    raise UserError(
        "Expected an immutable decoder, got "
        f"{type(given).__name__}. Write @dataclasses.dataclass(frozen=True).")
  missing = registry.missing_parts(given)
  if missing:
    raise UserError(
        "Expected a decoder such as 'exact' or ssd_jax.Exact(), got "
        f"{_short(given)} as decoder, without a {missing[0]}(). Subclass "
        "ssd_jax.DecoderBase; docs/extending.md shows how.")
  return given


def indices_of(
    first: int | Sequence[int], count: int, batch: int
) -> np.ndarray:
  """Returns the index of each image, then of what pads the last batch.

  Returns:
    int32 [I], I a multiple of `batch`.

  Raises:
    UserError: if `first` is neither a number nor a number for each image.
  """
  padded = -(-count // batch) * batch
  given = np.asarray(first)
  check(np.issubdtype(given.dtype, np.integer), "first_image", _short(first),
        "whole numbers")
  if given.ndim == 0:
    given = given + np.arange(padded)
  else:
    check(given.shape == (count,), "first_image", f"{len(given)} indices",
          f"one index, or one for each of {count} images")
    given = np.pad(given, (0, padded - count), "edge")
  check(given.min() >= 0 and given.max() < _INDICES, "first_image",
        _short(first), f"indices in [0, {_INDICES})")
  return given.astype(np.int32)


def grids_of(
    tokens: np.ndarray, grid: Grid, vocab: int,
    prompts: Sequence[str] | None = None,
) -> np.ndarray:
  """Returns token grids as int32 [B, R, C].

  Raises:
    UserError: if their shape, a token or the number of prompts is wrong.
  """
  given = np.asarray(tokens)
  if given.shape[1:] != (grid.rows, grid.cols) or not np.issubdtype(
      given.dtype, np.integer):
    raise UserError(
        f"Expected whole numbers [B, {grid.rows}, {grid.cols}], got tokens of "
        f"shape {given.shape} and dtype {given.dtype}. Pass for example "
        "generate(...).tokens.")
  if given.size and not 0 <= given.min() <= given.max() < vocab:
    raise UserError(
        f"Expected tokens in [0, {vocab}), got tokens from {given.min()} to "
        f"{given.max()}. Use tokens of this model.")
  if prompts is not None:
    check(not isinstance(prompts, str) and len(prompts) == len(given),
          "prompts", _short(prompts), f"a list of {len(given)}, one per grid")
  return given.astype(np.int32)


def prefix_of(
    prefix: np.ndarray | None, grid: Grid, vocab: int, count: int, batch: int
) -> np.ndarray | None:
  """Returns the given rows of each image, then of what pads the last batch.

  Args:
    prefix: Tokens of all images [rows, C] or of each, or None.
    grid: The image as a sequence.
    vocab: Image tokens V.
    count: Number of images.
    batch: Images decoded together.

  Returns:
    int32 [I, rows, C], I a multiple of `batch`, or None.

  Raises:
    UserError: if they are not rows of such a grid.
  """
  if prefix is None:
    return None
  given = np.asarray(prefix)
  if given.ndim == 2:
    given = np.broadcast_to(given, (count, *given.shape))
  is_right = given.ndim == 3 and len(given) == count and (
      given.shape[2] == grid.cols and 0 < given.shape[1] < grid.rows)
  if not is_right or not np.issubdtype(given.dtype, np.integer):
    raise UserError(
        f"Expected whole numbers [rows, {grid.cols}] with 1 to {grid.rows - 1} "
        f"rows, or one such array for each of {count} images, got a prefix of "
        f"shape {np.shape(prefix)} and kind {given.dtype}.")
  if not 0 <= given.min() <= given.max() < vocab:
    raise UserError(
        f"Expected tokens in [0, {vocab}), got a prefix from {given.min()} to "
        f"{given.max()}. Use tokens of this model.")
  given = np.pad(given, ((0, -count % batch), (0, 0), (0, 0)), "edge")
  return given.astype(np.int32)


def check_part(
    name: str, part: Params, params: Mapping[str, Params]
) -> None:
  """Raises UserError unless `part` can take the place of `params[name]`."""
  if name not in params:
    raise UserError(f"Expected a part of {sorted(params)}, got {name!r}.")
  shapes = lambda tree: {
      key: leaf.shape for key, leaf in leaves_by_path(tree, name).items()}
  got, expected = shapes(part), shapes(params[name])
  for key in sorted(got.keys() | expected.keys()):
    if got.get(key) != expected.get(key):
      raise UserError(
          f"Expected {key} of shape {expected.get(key, 'none')}, got shape "
          f"{got.get(key, 'none')}.")


def check_sampling(values: Mapping[str, Any]) -> None:
  """Raises UserError if a setting is not a number, or out of range."""
  for name, value in values.items():
    # Beyond these bounds logits or indices overflow.
    bound = _INDICES - 1 if name == "top_k" else _LARGEST
    check(_is_number(value) and abs(value) <= bound, name, _short(value),
          f"a number of at most {bound}")
  check(values["temperature"] >= 0, "temperature", values["temperature"],
        ">= 0")
  check(values["top_k"] >= 0, "top_k", values["top_k"], ">= 0, 0 for none")
  check(values["top_k"] % 1 == 0, "top_k", values["top_k"], "a whole number")
  check(0 < values["top_p"] <= 1, "top_p", values["top_p"], "in (0, 1]")


def _is_whole(value: Any) -> bool:
  try:
    operator.index(value)
  except TypeError:
    return False
  return not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  try:
    float(value)
  except (TypeError, ValueError, OverflowError):
    return False
  return not isinstance(value, (str, bytes, bool))


def _short(value: Any) -> str:
  """Returns the repr of a value in at most 60 characters of one line."""
  return " ".join(repr(value).split())[:60]
