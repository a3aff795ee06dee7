"""One thread that decodes the images of all requests, batched continuously."""

from collections.abc import Callable
import concurrent.futures
import logging
import math
import threading
import time

import jax
import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.types import Prompt
from ssd_jax.decoding import continuous_batching
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.pipeline.slots import Finished, Item
from ssd_jax.serving.fair_queue import FairQueue
from ssd_jax.serving.lanes import Lane, LaneKey, Turn
from ssd_jax.serving.metrics import Metrics
from ssd_jax.serving.requests import ApiError, ImageRequest, Served
from ssd_jax.serving.tickets import (
  Completed,
  Drawing,
  Event,
  Partial,
  Progress,
  Ticket,
  encode_file,
)

_WARM_TEXT = "a"
_PROMPT_SLOTS = 128  # that prompts of any length are padded to
_TICK = 0.5  # seconds between two looks at deadlines while nothing runs


class Scheduler:
  """Decodes images in lanes; a slot that becomes free takes the next image.

  An image is the one that `Pipeline.generate` makes with the request's seed,
  whichever images share its batch.

  Attributes:
    served: What the server offers.
    metrics: What is counted.
    grid: The image as a grid of tokens.
  """

  def __init__(
      self, pipe: Pipeline, served: Served, batch: int, metrics: Metrics
  ):
    self.served, self.metrics = served, metrics
    self._pipe, self._sizes = pipe, tuple(sorted({1, batch}))
    self.grid = pipe.model.grid
    self._change = threading.Condition()
    self._queue: FairQueue[Drawing] = FairQueue()
    self._lanes: dict[LaneKey, Lane | None] = {}  # None: being made ready
    self._slots = self._prompt_slots()
    self._seconds_per_image = 1.0
    self._is_open, self._is_draining, self._is_alive = True, False, True
    self._is_busy = False
    self._warmer, self._painter = (
        concurrent.futures.ThreadPoolExecutor(1, name)
        for name in ("compiling", "painting"))
    metrics.gauge("requests_waiting", "Images that wait for a slot.",
                  lambda: len(self._queue))
    metrics.gauge("requests_running", "Images in slots.", self._count_running)
    self._default = self._warm_defaults()
    self._thread = threading.Thread(target=self._work, name="scheduler",
                                    daemon=True)
    self._thread.start()

  # --- what the server asks

  @property
  def is_alive(self) -> bool:
    """Whether images are still decoded."""
    return self._is_alive

  @property
  def is_ready(self) -> bool:
    """Whether all that is served is compiled, and requests are accepted."""
    return (self._is_alive and not self._is_draining
            and all(self._lanes.get(key) for key in self._default))

  def submit(
      self, request: ImageRequest, listen: Callable[[Event], None]
  ) -> Ticket:
    """Queues a request.

    Args:
      request: The request.
      listen: Called with its events, by threads of the scheduler.

    Raises:
      ApiError: if it is not accepted.
    """
    ticket, key = self._ticket(request, listen)
    with self._change:
      self._admit(request.images)
      if self._lanes.setdefault(key, None) is None:
        self._warm(key)
      for number in range(request.images):
        drawing = Drawing(ticket, number)
        drawing.item = Item(
            drawing, number, jax.random.key(request.seed), ticket.prompt,
            ticket.sampling)
        self._queue.put(request.client, drawing)
      self._is_busy = True
      self._change.notify_all()
    self.metrics.prompt_tokens.inc(int(np.sum(ticket.prompt.mask[0])))
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Ends a request that nobody waits for any more."""
    if ticket.end("cancelled"):
      self._count_end(ticket)
      with self._change:
        self._change.notify_all()

  def drain(self, seconds: float) -> bool:
    """Accepts nothing more, and waits until all requests have ended.

    Args:
      seconds: Time after which what is left fails.

    Returns:
      Whether all were drawn.
    """
    deadline = time.monotonic() + seconds
    with self._change:
      self._is_draining = True
      was_done = self._change.wait_for(lambda: not self._is_busy, seconds)
    if not was_done:
      error = ApiError(503, "Expected a server that runs, got one that ends. "
                            "Try again.", "server_error", code="unavailable",
                       retry_after=5)
      for ticket in self._tickets():
        self._end(ticket, "error", error)
    self.close()
    self._painter.shutdown(wait=time.monotonic() < deadline or was_done)
    return was_done

  def close(self) -> None:
    """Stops after the passes that are running."""
    with self._change:
      self._is_open, self._is_draining = False, True
      self._change.notify_all()
    self._thread.join()
    self._warmer.shutdown(wait=False, cancel_futures=True)

  # --- accepting

  def _prompt_slots(self) -> int:
    """Returns the width of all prompts: the family's, if it has one."""
    short, _ = self._pipe.family.encode_prompts([_WARM_TEXT], False)
    try:
      longer, _ = self._pipe.family.encode_prompts([_WARM_TEXT * 9], False)
    except UserError:  # a family of classes
      longer = short
    width = short.tokens.shape[1]
    if longer.tokens.shape[1] == width:
      return width
    return max(_PROMPT_SLOTS, width)

  def _encode(self, text: str, guided: bool) -> tuple[Prompt, list[str]]:
    prompt, notes = self._pipe.family.encode_prompts([text], guided)
    width = prompt.tokens.shape[1]
    if width > self._slots:
      raise ApiError(400, f"Expected a prompt of at most {self._slots} tokens, "
                          f"got {width} tokens. Shorten it.", param="prompt")
    return continuous_batching.widen(prompt, self._slots), notes

  def _ticket(
      self, request: ImageRequest, listen: Callable[[Event], None]
  ) -> tuple[Ticket, LaneKey]:
    """Returns the ticket of a request, and the lane that it needs."""
    try:
      settings, guided = self._pipe.sampling(**request.sampling)
      prompt, notes = self._encode(request.prompt, guided)
      if request.decoder not in self.served.decoders.values():
        self._pipe.num_queries(request.decoder, [request.prompt],
                               **request.sampling)
    except UserError as error:
      raise ApiError(400, str(error)) from error
    filtered = settings.use_top_k or settings.use_top_p
    if filtered:
      settings = settings.with_filters()
    deadline = time.monotonic() + self.served.limits.seconds
    ticket = Ticket(request, prompt, settings, tuple(notes), listen, deadline)
    return ticket, LaneKey(request.decoder, guided, filtered)

  def _admit(self, images: int) -> None:
    """Raises ApiError if so many more images cannot be taken."""
    limits = self.served.limits
    if self._is_draining or not self._is_alive:
      raise ApiError(503, "Expected a server that accepts requests, got one "
                          "that ends. Try again.", "server_error",
                     code="unavailable", retry_after=5)
    waiting = len(self._queue)
    seconds = (waiting + images) * self._seconds_per_image
    if waiting + images > limits.waiting or seconds > limits.seconds:
      raise ApiError(
          429, f"Expected at most {limits.waiting} waiting images, got "
          f"{waiting} and {images} more. Try again later.",
          "rate_limit_error", code="queue_full",
          retry_after=max(math.ceil(waiting * self._seconds_per_image), 1))

  # --- lanes

  def _warm_defaults(self) -> list[LaneKey]:
    """Makes ready what a request can ask for without naming a new decoder."""
    settings, guided = self._pipe.sampling()
    plain = settings.use_top_k or settings.use_top_p
    keys = [LaneKey(decoder, guided, filtered)
            for decoder in self.served.decoders.values()
            for filtered in sorted({plain, True})]
    for key in keys:
      self._lanes[key] = None
      self._warm(key)
    return keys

  def _warm(self, key: LaneKey) -> None:
    self._warmer.submit(self._make_ready, key)

  def _make_ready(self, key: LaneKey) -> None:
    """Compiles a lane, unless that is done; runs in the compiling thread."""
    if self._lanes.get(key) is not None:
      return
    start = time.monotonic()
    try:
      lane = Lane(self._pipe, key, self._sizes)
      guidance = None if key.guided else 1.0
      settings, _ = self._pipe.sampling(guidance=guidance)
      if key.filtered:
        settings = settings.with_filters()
      prompt, _ = self._encode(_WARM_TEXT, key.guided)
      lane.warm(Item(None, 0, jax.random.key(0), prompt, settings))
    except Exception:
      logging.exception("a decoder could not be made ready")
      self._fail(self._tickets(lambda d: self._key(d) == key))
      with self._change:
        self._lanes.pop(key, None)
      return
    self.metrics.compile_seconds.inc(time.monotonic() - start)
    with self._change:
      self._lanes[key] = lane
      self._change.notify_all()

  def _key(self, drawing: Drawing) -> LaneKey:
    sampling = drawing.item.sampling
    guided = len(drawing.ticket.prompt.tokens) > 1
    return LaneKey(
        drawing.ticket.request.decoder, guided, sampling.use_top_k)

  def _forget_lanes(self) -> None:
    """Drops the programs of decoders that were asked for longest ago."""
    idle = [lane for key, lane in self._lanes.items()
            if lane and key not in self._default
            and not any(lane.drawings())
            and not any(self._key(d) == key for d in self._queue)]
    idle.sort(key=lambda lane: lane.used)
    extra = len(self._lanes) - max(self.served.limits.lanes,
                                   len(self._default))
    for lane in idle[:max(extra, 0)]:
      del self._lanes[lane.key]
      if not any(key.decoder == lane.key.decoder for key in self._lanes):
        self._pipe.programs.forget(lane.key.decoder)

  # --- decoding, in the scheduler's thread

  def _ready(self) -> list[Lane]:
    return [lane for lane in self._lanes.values() if lane is not None]

  def _count_running(self) -> int:
    return sum(1 for lane in list(self._lanes.values()) if lane
               for _ in lane.drawings())

  def _has_work(self) -> bool:
    if not self._is_open or self._count_running():
      return True
    return any(self._lanes.get(self._key(d)) for d in self._queue)

  def _work(self) -> None:
    try:
      while self._is_open:
        with self._change:
          self._change.wait_for(self._has_work, _TICK)
          self._end_overdue()
          self._forget_lanes()
          lanes = self._ready()
        for lane in lanes:
          self._serve(lane)
        with self._change:
          self._is_busy = bool(self._queue) or self._count_running() > 0
          self._change.notify_all()  # somebody may wait for the end
    except Exception:
      logging.exception("the scheduler ended")
      self._is_alive = False
      self._fail(self._tickets())

  def _serve(self, lane: Lane) -> None:
    """Fills a lane's slots and runs a few passes."""
    try:
      for slots, slot, drawing in list(lane.drawings()):
        if drawing.ticket.reason is not None:
          slots.evict(slot)
      with self._change:
        waiting = sum(self._key(d) == lane.key for d in self._queue)
      lane.fill(lambda: self._take(lane.key), waiting)
      for turn in lane.turn():
        self._deliver(lane, turn)
    except Exception:
      logging.exception("a batch failed")
      self._fail(self._tickets(lambda drawing: self._key(drawing) == lane.key))
      lane.reset()

  def _take(self, key: LaneKey) -> Drawing | None:
    with self._change:
      drawing = self._queue.take(lambda d: self._key(d) == key)
    if drawing is not None:
      self.metrics.queue_seconds.observe(
          time.monotonic() - drawing.ticket.arrived)
    return drawing

  def _deliver(self, lane: Lane, turn: Turn) -> None:
    """Hands over what a turn has made; pixels come from another thread."""
    name = lane.key.decoder.name
    self.metrics.passes.labels(name).inc(turn.passes)
    self.metrics.pass_seconds.labels(name).inc(turn.seconds)
    for state, slots in (("busy", turn.busy), ("idle", turn.slots - turn.busy)):
      self.metrics.slot_passes.labels(name, state).inc(slots * turn.passes)
    for drawing, tokens, commit_pass in turn.drawings:
      request = drawing.ticket.request
      if request.progress:
        drawing.ticket.listen(Progress(drawing.number, commit_pass))
      if drawing.is_due(float(np.mean(commit_pass > 0))):
        drawing.partials += 1
        self._paint(self._send_partial, drawing, drawing.partials - 1, tokens,
                    commit_pass)
    for found in turn.finished:
      seconds = time.monotonic() - found.name.started
      own = seconds / turn.busy
      self._seconds_per_image += 0.1 * (own - self._seconds_per_image)
      self._paint(self._send_completed, found.name, found, seconds)

  # --- painting, in a thread of its own

  def _paint(self, function: Callable, drawing: Drawing, *args) -> None:
    def safely():
      if drawing.ticket.reason is not None:
        return
      try:
        function(drawing, *args)
      except Exception:
        logging.exception("an image could not be painted")
        self._fail([drawing.ticket])

    self._painter.submit(safely)

  def _send_partial(
      self, drawing: Drawing, index: int, tokens: np.ndarray,
      commit_pass: np.ndarray,
  ) -> None:
    image = self._pipe.decode_images(tokens[None], 1)[0]
    file = encode_file(image, drawing.ticket.request)
    self._count_first(drawing, index)
    drawing.ticket.listen(Partial(drawing.number, index, file, commit_pass))

  def _send_completed(
      self, drawing: Drawing, found: Finished, seconds: float
  ) -> None:
    ticket, name = drawing.ticket, drawing.ticket.request.decoder.name
    file = encode_file(np.asarray(found.pixels)[0], ticket.request)
    if not drawing.partials:
      self._count_first(drawing, 0)
    self.metrics.images.labels(name).inc()
    self.metrics.tokens.labels(name).inc(found.tokens.size)
    self.metrics.image_passes.labels(name).inc(found.passes)
    if ticket.complete(Completed(
        drawing.number, file, found.passes, seconds, found.commit_pass)):
      self._count_end(ticket)

  def _count_first(self, drawing: Drawing, index: int) -> None:
    if not drawing.number and not index:
      self.metrics.first_partial_seconds.observe(
          time.monotonic() - drawing.ticket.arrived)

  # --- ends

  def _tickets(
      self, is_wanted: Callable[[Drawing], bool] = lambda _: True
  ) -> list[Ticket]:
    """Returns the requests that wait or are drawn."""
    with self._change:
      drawings = list(self._queue) + [
          d for lane in self._ready() for _, _, d in lane.drawings()]
    return list({id(d.ticket): d.ticket for d in drawings if is_wanted(d)}
                .values())

  def _end_overdue(self) -> None:
    """Ends requests whose time is over, and drops what has ended."""
    now = time.monotonic()
    for ticket in self._tickets():
      if now > ticket.deadline:
        self._end(ticket, "deadline", ApiError(
            504, "Expected to be done within "
            f"{self.served.limits.seconds:g} seconds, got more work than that. "
            "Try again later.", "timeout", code="timeout"))
    self._queue.drop(lambda d: d.ticket.reason is not None)

  def _fail(self, tickets: list[Ticket]) -> None:
    for ticket in tickets:
      self._end(ticket, "error", ApiError(
          500, "Expected to draw this request, got an error of the server.",
          "server_error", code="internal_error"))

  def _end(self, ticket: Ticket, reason: str, error: ApiError) -> None:
    if ticket.end(reason, error):
      self._count_end(ticket)

  def _count_end(self, ticket: Ticket) -> None:
    seconds = time.monotonic() - ticket.arrived
    self.metrics.requests.labels(ticket.reason).inc()
    self.metrics.request_seconds.labels(ticket.reason).observe(seconds)
