"""One thread that decodes the images of all requests, batched continuously."""

from collections.abc import Callable
import concurrent.futures
import logging
import math
import threading
import time

import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.pipeline.slots import Finished, Item
from ssd_jax.serving.batches import Batches, LaneKey
from ssd_jax.serving.fair_queue import FairQueue
from ssd_jax.serving.lane_pool import LanePool, PromptEncoder
from ssd_jax.serving.lanes import Lane, Turn, lane_key
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

_TICK = 0.5  # seconds between two looks at deadlines while nothing runs


class Scheduler:
  """Decodes images in lanes; a slot that becomes free takes the next image.

  An image is the one that `Pipeline.generate` makes with the request's seed,
  whichever images share its batch.

  Attributes:
    served: What the server offers.
    metrics: What is counted.
    grid: The image as a grid of tokens.
    failure: Why what is always served cannot be, or None.
    on_failure: Called when there is a failure.
  """

  def __init__(
      self, pipe: Pipeline, served: Served, batches: Batches, metrics: Metrics
  ):
    self.served, self.metrics = served, metrics
    self._pipe, self.grid = pipe, pipe.model.grid
    self._change = threading.Condition()
    self._queue: FairQueue[Drawing] = FairQueue()
    self._open: dict[Ticket, LaneKey] = {}  # requests that have not ended
    self._seconds_per_image = 1.0
    self._is_open, self._is_draining, self._is_alive = True, False, True
    self._is_busy = False
    self.failure: Exception | None = None
    self.on_failure: Callable[[], None] = lambda: None
    self._batches = batches
    self._painter = concurrent.futures.ThreadPoolExecutor(1, "painting")
    self._encode = PromptEncoder(pipe)
    self._lanes = LanePool(
        pipe, self._encode, batches, self._defaults(), served.limits.lanes,
        self._change, self._on_no_lane, metrics)
    metrics.gauge("requests_waiting", "Images that wait for a slot.",
                  lambda: len(self._queue))
    metrics.gauge("requests_running", "Images in slots.", self._count_running)
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
    return (
        self._is_alive and not self._is_draining and self._lanes.is_ready)

  @property
  def is_compiling(self) -> bool:
    """Whether a decoder is being compiled."""
    return self._lanes.is_compiling

  def submit(
      self, request: ImageRequest, listen: Callable[[Event], None],
      given: np.ndarray | None = None,
  ) -> Ticket:
    """Queues a request.

    Args:
      request: The request.
      listen: Called with its events, by threads of the scheduler.
      given: int32 [rows, C], rows of tokens that the images begin with.

    Raises:
      ApiError: if it is not accepted.
    """
    ticket, key = self._ticket(request, listen, given)
    with self._change:
      self._check_room(request.images)
      self._open[ticket] = key
      self._lanes.ask(key)
      for number in range(request.images):
        drawing = Drawing(ticket, number)
        drawing.item = Item(
            drawing, number, request.seed, ticket.prompt, ticket.sampling,
            given)
        self._queue.put(request.client, drawing)
      self._is_busy = True
      self._change.notify_all()
    self.metrics.prompt_tokens.inc(int(np.sum(ticket.prompt.mask[0])))
    return ticket

  def encode_images(self, images: np.ndarray) -> np.ndarray:
    """Returns the token grids of images; see `Pipeline.encode_images`."""
    return self._batches.encode_images(images)

  def cancel(self, ticket: Ticket) -> None:
    """Cancels a request."""
    if ticket.end("cancelled"):
      self._count_end(ticket)
      with self._change:
        self._change.notify_all()

  def drain(self, seconds: float) -> bool:
    """Accepts nothing more, and waits until all requests have ended.

    Args:
      seconds: Time after which what is left fails.

    Returns:
      Whether all requests completed.
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
    self._lanes.close()

  # --- accepting

  def _defaults(self) -> list[LaneKey]:
    """Returns what requests that name a served decoder need."""
    settings, guided = self._pipe.sampling()
    plain = settings.use_top_k or settings.use_top_p
    return [LaneKey(decoder, guided, filtered)
            for decoder in self.served.decoders.values()
            for filtered in sorted({plain, True})]

  def _ticket(
      self, request: ImageRequest, listen: Callable[[Event], None],
      given: np.ndarray | None,
  ) -> tuple[Ticket, LaneKey]:
    """Returns the ticket of a request, and the lane that it needs."""
    try:
      settings, guided = self._pipe.sampling(**request.sampling)
      prompt, notes = self._encode(request.prompt, guided)
      if request.decoder not in self.served.decoders.values():
        self._batches.check(
            request.decoder, request.prompt, request.sampling)
    except UserError as error:
      raise ApiError(400, str(error)) from error
    filtered = settings.use_top_k or settings.use_top_p
    if filtered:
      settings = settings.with_filters()
    deadline = time.monotonic() + self.served.limits.seconds
    ticket = Ticket(request, prompt, settings, notes, given, listen, deadline)
    rows = 0 if given is None else len(given)
    return ticket, LaneKey(request.decoder, guided, filtered, rows)

  def _check_room(self, images: int) -> None:
    """Raises ApiError if so many more images cannot be taken."""
    limits = self.served.limits
    if self._is_draining or not self._is_alive:
      raise ApiError(503, "Expected a server that accepts requests, got one "
                          "that ends. Try again.", "server_error",
                     code="unavailable", retry_after=5)
    waiting = len(self._queue)
    # With nothing ahead it is tried, or a wrong guess would never be mended.
    seconds = (waiting + images) * self._seconds_per_image if waiting else 0.0
    if waiting + images > limits.waiting or seconds > limits.seconds:
      raise ApiError(
          429, f"Expected at most {limits.waiting} waiting images, got "
          f"{waiting} and {images} more. Try again later.",
          "rate_limit_error", code="queue_full",
          retry_after=max(math.ceil(waiting * self._seconds_per_image), 1))

  # --- decoding, in the scheduler's thread

  def _count_running(self) -> int:
    return sum(1 for lane in self._lanes for _ in lane.drawings())

  def _keys(self) -> set[LaneKey]:
    """Returns what the waiting images need."""
    return {lane_key(drawing) for drawing in self._queue}

  def _has_work(self) -> bool:
    if not self._is_open or self._count_running():
      return True
    return any(key in self._lanes for key in self._keys())

  def _work(self) -> None:
    try:
      self._serve_lanes()
    except Exception:
      logging.exception("the scheduler ended")
      self._is_alive = False
      self._fail(self._tickets())

  def _serve_lanes(self) -> None:
    while self._is_open:
      with self._change:
        self._change.wait_for(self._has_work, _TICK)
        self._end_overdue()
        self._lanes.forget(self._keys())
        lanes = list(self._lanes)
      if not self._count_running():
        self._batches.idle()
      for lane in lanes:
        self._serve(lane)
      with self._change:
        self._is_busy = bool(self._queue) or self._count_running() > 0
        self._change.notify_all()  # somebody may wait for the end

  def _serve(self, lane: Lane) -> None:
    """Fills a lane's slots and runs a few passes."""
    try:
      lane.evict(lambda drawing: drawing.ticket.reason is not None)
      with self._change:
        waiting = sum(lane_key(d) == lane.key for d in self._queue)
      lane.fill(lambda: self._take(lane.key), waiting)
      for turn in lane.turn():
        self._deliver(lane, turn)
    except Exception:
      logging.exception("a batch failed")
      self._fail_lane(lane.key)
      lane.clear()

  def _take(self, key: LaneKey) -> Drawing | None:
    with self._change:
      drawing = self._queue.take(lambda d: lane_key(d) == key)
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
    image = self._batches.decode_image(tokens)
    file = encode_file(image, drawing.ticket.request)
    self._count_first(drawing, index)
    drawing.ticket.listen(Partial(drawing.number, commit_pass, index, file))

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
        drawing.number, found.commit_pass, file, found.passes, seconds)):
      self._count_end(ticket)

  def _count_first(self, drawing: Drawing, index: int) -> None:
    if not drawing.number and not index:
      self.metrics.first_partial_seconds.observe(
          time.monotonic() - drawing.ticket.arrived)

  # --- ends

  def _tickets(self, lane: LaneKey | None = None) -> list[Ticket]:
    """Returns the requests that have not ended, all or those of a lane.

    Wherever their images are: an error may have taken one from its slot.
    """
    with self._change:
      return [ticket for ticket, key in self._open.items()
              if lane in (None, key)]

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

  def _on_no_lane(self, key: LaneKey, error: Exception) -> None:
    """Fails what waits for a lane that cannot be made; see `LanePool`."""
    if key in self._defaults():
      self.failure, self._is_alive = error, False
      self.on_failure()
    if isinstance(error, UserError):
      for ticket in self._tickets(key):
        self._end(ticket, "error", ApiError(400, str(error), param="decoder"))
    self._fail_lane(key)

  def _fail_lane(self, key: LaneKey) -> None:
    """Fails a lane's requests."""
    self._fail(self._tickets(key))

  def _fail(self, tickets: list[Ticket]) -> None:
    for ticket in tickets:
      self._end(ticket, "error", ApiError(
          500, "Expected to complete this request, got an internal error.",
          "server_error", code="internal_error"))

  def _end(self, ticket: Ticket, reason: str, error: ApiError) -> None:
    if ticket.end(reason, error):
      self._count_end(ticket)

  def _count_end(self, ticket: Ticket) -> None:
    with self._change:
      self._open.pop(ticket, None)
    seconds = time.monotonic() - ticket.arrived
    self.metrics.requests.labels(ticket.reason).inc()
    self.metrics.request_seconds.labels(ticket.reason).observe(seconds)
