"""The lanes of a server, made ready in the background and kept while used."""

from collections.abc import Callable, Collection, Iterator
import concurrent.futures
import logging
import threading
import time

import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.types import Prompt
from ssd_jax.decoding import continuous_batching
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.pipeline.slots import Item
from ssd_jax.serving.batches import Batches, LaneKey
from ssd_jax.serving.lanes import Lane
from ssd_jax.serving.metrics import Metrics
from ssd_jax.serving.requests import ApiError

_TEXT = "a"  # that lanes are made ready with
_PROMPT_SLOTS = 128  # that prompts of any length are padded to


class PromptEncoder:
  """Encodes prompts in one width, so that none needs another program."""

  def __init__(self, pipe: Pipeline):
    self._family = pipe.family
    short, _ = self._family.encode_prompts([_TEXT], False)
    try:
      longer, _ = self._family.encode_prompts([_TEXT * 9], False)
    except UserError:  # a family of classes
      longer = short
    self._slots = short.tokens.shape[1]
    if longer.tokens.shape[1] != self._slots:
      self._slots = max(_PROMPT_SLOTS, self._slots)

  def __call__(
      self, text: str, guided: bool
  ) -> tuple[Prompt, tuple[str, ...]]:
    """Returns the encoded prompt, and notes for the client.

    Args:
      text: The prompt.
      guided: Whether an unconditional stream follows.

    Raises:
      ApiError: if it is too long.
    """
    prompt, notes = self._family.encode_prompts([text], guided)
    width = prompt.tokens.shape[1]
    if width > self._slots:
      raise ApiError(400, f"Expected a prompt of at most {self._slots} tokens, "
                          f"got {width} tokens. Shorten it.", param="prompt")
    return continuous_batching.widen(prompt, self._slots), tuple(notes)


class LanePool:
  """Lanes by what their images have in common.

  Args:
    pipe: The model.
    encode: Encodes prompts.
    batches: The batches of the lanes.
    always: Lanes that are made ready at once and kept.
    most: Most lanes that are kept.
    change: Held whenever the pool is read or changed; notified of new lanes.
    on_failure: Called with the key of a lane that cannot be made, and why.
    metrics: What is counted.
  """

  def __init__(
      self, pipe: Pipeline, encode: PromptEncoder, batches: Batches,
      always: Collection[LaneKey], most: int, change: threading.Condition,
      on_failure: Callable[[LaneKey, Exception], None], metrics: Metrics,
  ):
    self._pipe, self._encode, self._batches = pipe, encode, batches
    self._always, self._most = always, max(most, len(always))
    self._change, self._on_failure = change, on_failure
    self._metrics = metrics
    self._lanes: dict[LaneKey, Lane | None] = {}  # None: being made
    self._maker = concurrent.futures.ThreadPoolExecutor(1, "compiling")
    for key in always:
      self.ask(key)

  def __iter__(self) -> Iterator[Lane]:
    """Iterates over the lanes that are ready."""
    # list() is one step, so that any thread may ask.
    return iter([x for x in list(self._lanes.values()) if x is not None])

  def __contains__(self, key: LaneKey) -> bool:
    """Returns whether a lane is ready."""
    return self._lanes.get(key) is not None

  @property
  def is_ready(self) -> bool:
    """Whether the lanes that are always kept are ready."""
    return all(key in self for key in self._always)

  @property
  def is_compiling(self) -> bool:
    """Whether a lane is being made ready."""
    return any(lane is None for lane in list(self._lanes.values()))

  def ask(self, key: LaneKey) -> None:
    """Makes a lane ready in the background, unless it is."""
    with self._change:
      if key not in self._lanes:
        self._lanes[key] = None
        self._maker.submit(self._make, key)

  def forget(self, wanted: Collection[LaneKey]) -> None:
    """Drops the lanes used longest ago, if there are too many.

    Args:
      wanted: Lanes that somebody waits for.
    """
    extra = len(self._lanes) - self._most
    if extra <= 0:
      return
    idle = [lane for lane in self if not any(lane.drawings())
            and lane.key not in self._always and lane.key not in wanted]
    for lane in sorted(idle, key=lambda lane: lane.used)[:extra]:
      del self._lanes[lane.key]
      self._batches.close(lane.key)

  def close(self) -> None:
    """Makes no more lanes."""
    self._maker.shutdown(wait=False, cancel_futures=True)

  def _make(self, key: LaneKey) -> None:
    """Compiles what a lane runs; in the thread for that."""
    start = time.monotonic()
    try:
      self._batches.open(key, self._item(key))
    except Exception as error:
      if not isinstance(error, UserError):
        logging.exception("a decoder could not be made ready")
      with self._change:
        del self._lanes[key]
        self._on_failure(key, error)
      return
    self._metrics.compile_seconds.inc(time.monotonic() - start)
    with self._change:
      self._lanes[key] = Lane(self._batches, key)
      self._change.notify_all()

  def _item(self, key: LaneKey) -> Item:
    """Returns an image to make a lane ready with."""
    settings, _ = self._pipe.sampling(guidance=None if key.guided else 1.0)
    if key.filtered:
      settings = settings.with_filters()
    given = None
    if key.rows:
      given = np.zeros((key.rows, self._pipe.model.grid.cols), np.int32)
    prompt, _ = self._encode(_TEXT, key.guided)
    return Item(None, 0, 0, prompt, settings, given)
