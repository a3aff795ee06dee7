"""OpenAI's Images API over HTTP: requests, replies and events.

See https://platform.openai.com/docs/api-reference/images and, for events,
.../images-streaming. Fields beyond the API's are `seed`, `guidance_scale`,
`temperature`, `top_k`, `top_p`, `decoder` and `progress`.
"""

import asyncio
import base64
import collections
from collections.abc import AsyncIterator, Coroutine
import hmac
import json
import secrets
import time
from typing import Any, TypeVar

import numpy as np

from ssd_jax.core.extras import need
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.serving import edits
from ssd_jax.serving.openapi import document
from ssd_jax.serving.requests import FORMATS, ApiError, ImageRequest, parse
from ssd_jax.serving.scheduler import Scheduler
from ssd_jax.serving.tickets import (
  Completed,
  Event,
  Failed,
  Partial,
  Progress,
  Ticket,
)

_PING = 15.0  # seconds of silence after which a stream says that it lives
_BODY_SECONDS = 60.0  # in which a client has to send its body
_MOST_EVENTS = 64  # that wait for a slow reader; then progress is left out
_KEPT, _KEPT_SECONDS = 256, 3600.0  # images behind URLs

T = TypeVar("T")


class Files:
  """Images that clients may fetch for a while, by names that none can guess."""

  def __init__(self) -> None:
    self._files: collections.OrderedDict[str, tuple[float, bytes]] = (
        collections.OrderedDict())

  def put(self, file: bytes, kind: str) -> str:
    """Keeps a file, and returns its name."""
    name = f"{secrets.token_urlsafe(16)}.{kind}"
    self._files[name] = time.monotonic() + _KEPT_SECONDS, file
    while len(self._files) > _KEPT:
      self._files.popitem(last=False)
    return name

  def get(self, name: str) -> bytes | None:
    """Returns a file, or None if there is none any more."""
    end, file = self._files.get(name, (0.0, b""))
    return file if time.monotonic() < end else None


class ImagesApi:
  """Handlers of the API's routes.

  Args:
    scheduler: Generates the images.
    pipe: The model.
    key: Key that clients must show, or None.
  """

  def __init__(
      self, scheduler: Scheduler, pipe: Pipeline, key: str | None = None
  ):
    self._scheduler, self._pipe, self._key = scheduler, pipe, key
    self._served = scheduler.served
    self._responses = need("starlette.responses", "serve")
    self._files, self._started = Files(), int(time.time())

  def routes(self) -> list[Any]:
    """Returns Starlette's routes."""
    route = need("starlette.routing", "serve").Route
    return [
        route("/v1/images/generations", self.generations, methods=["POST"]),
        route("/v1/images/edits", self.edits, methods=["POST"]),
        route("/v1/images/files/{name}", self.file),
        route("/v1/models", self.models),
        route("/v1/models/{name:path}", self.model),
        route("/health", self.health),
        route("/ready", self.ready),
        route("/metrics", self.metrics),
        route("/openapi.json", self.openapi),
    ]

  # --- routes

  async def generations(self, request: Any) -> Any:
    """Generates images; replies with all of them or a stream of events."""
    self._check_key(request)
    values = await _within(self._json(request))
    wanted = parse(values, self._served, _client(request))
    return await self._draw(request, wanted, None)

  async def edits(self, request: Any) -> Any:
    """Completes an image; replies as `generations` does."""
    self._check_key(request)
    fields, files = await _within(edits.read_form(request))
    wanted = parse(fields, self._served, _client(request))
    to_thread = need("anyio.to_thread", "serve")
    given = await to_thread.run_sync(
        edits.kept_rows, fields, files, self._scheduler.grid,
        self._pipe.image_shape, self._scheduler.encode_images)
    return await self._draw(request, wanted, given)

  async def _draw(
      self, request: Any, wanted: ImageRequest, given: np.ndarray | None
  ) -> Any:
    """Generates the requested images below the given rows."""
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(event: Event) -> None:
      if not (isinstance(event, Progress) and events.qsize() > _MOST_EVENTS):
        events.put_nowait(event)

    def listen(event: Event) -> None:
      if not loop.is_closed():
        loop.call_soon_threadsafe(put, event)

    to_thread = need("anyio.to_thread", "serve")
    ticket = await to_thread.run_sync(
        self._scheduler.submit, wanted, listen, given)
    base = str(request.base_url)
    if not wanted.stream:
      return await self._whole(request, ticket, events, base)
    response = self._responses.StreamingResponse(
        self._stream(ticket, events, base), media_type="text/event-stream")

    async def send_all(scope: Any, receive: Any, send: Any) -> None:
      try:
        await response(scope, receive, send)
      finally:  # also of a client that left before the first event
        self._scheduler.cancel(ticket)

    return send_all

  async def file(self, request: Any) -> Any:
    """Returns an image that a reply named by its URL."""
    name = request.path_params["name"]
    found = self._files.get(name)
    if found is None:
      raise ApiError(404, "Expected an image that is kept, got another name. "
                          "Draw it again.", code="not_found")
    kind = FORMATS[name.rpartition(".")[2]]
    return self._responses.Response(found, media_type=kind)

  async def models(self, request: Any) -> Any:
    """Lists the model and its aliases."""
    self._check_key(request)
    return self._json_response({
        "object": "list",
        "data": [self._model(name) for name in self._served.names]})

  async def model(self, request: Any) -> Any:
    """Describes one model."""
    self._check_key(request)
    name = request.path_params["name"]
    if name not in self._served.names:
      raise ApiError(404, f"Expected the model {self._served.names[0]}, got "
                          f"{name[:60]!r}.", param="model",
                     code="model_not_found")
    return self._json_response(self._model(name))

  async def health(self, request: Any) -> Any:
    """Reports whether the scheduler is alive."""
    return self._responses.Response(
        status_code=200 if self._scheduler.is_alive else 503)

  async def ready(self, request: Any) -> Any:
    """Says whether requests are accepted and need no compiling."""
    return self._responses.Response(
        status_code=200 if self._scheduler.is_ready else 503)

  async def metrics(self, request: Any) -> Any:
    """Returns what is counted, for Prometheus."""
    text, kind = self._scheduler.metrics.text()
    return self._responses.Response(text, headers={"Content-Type": kind})

  async def openapi(self, request: Any) -> Any:
    """Returns the OpenAPI document."""
    return self._json_response(document(self._served))

  # --- replies

  async def _whole(
      self, request: Any, ticket: Ticket,
      events: asyncio.Queue[Event | None], base: str,
  ) -> Any:
    """Waits for all images; gives up when the client has left."""
    data: dict[int, dict[str, Any]] = {}
    watch = asyncio.ensure_future(_when_left(request, events))
    try:
      while len(data) < ticket.request.images:
        event = await events.get()
        if event is None:
          return self._responses.Response(status_code=499)
        if isinstance(event, Failed):
          raise event.error
        if isinstance(event, Completed):
          data[event.image] = self._image(ticket, event, base)
    finally:
      watch.cancel()
      self._scheduler.cancel(ticket)
    return self._json_response({
        "created": int(time.time()), **self._common(ticket.request),
        "data": [data[i] for i in sorted(data)],
        "usage": self._usage(ticket, ticket.request.images),
        "notes": list(ticket.notes)})

  async def _stream(
      self, ticket: Ticket, events: asyncio.Queue[Event | None], base: str
  ) -> AsyncIterator[bytes]:
    """Yields events until all images are complete or the request failed."""
    left = ticket.request.images
    while left:
      try:
        event = await asyncio.wait_for(events.get(), _PING)
      except TimeoutError:
        yield b": ping\n\n"
        continue
      assert event is not None  # the response itself sees a client leave
      if isinstance(event, Failed):
        yield _sse("error", {"type": "error", **event.error.body()})
        return
      left -= isinstance(event, Completed)
      yield self._event(ticket, event, base)

  def _event(self, ticket: Ticket, event: Event, base: str) -> bytes:
    """Encodes an event."""
    wanted, body = ticket.request, {"image_index": event.image}  # type: ignore
    if wanted.progress:
      body["commit_pass"] = event.commit_pass.tolist()  # type: ignore
    if isinstance(event, Progress):
      return _sse("ssd_jax.progress", body)
    kind = "image_generation" if ticket.given is None else "image_edit"
    body |= self._common(wanted) | {"created_at": int(time.time())}
    if isinstance(event, Partial):
      body["partial_image_index"] = event.index
      body["b64_json"] = base64.b64encode(event.file).decode()
      return _sse(f"{kind}.partial_image", body)
    assert isinstance(event, Completed)
    body |= self._image(ticket, event, base)
    body |= {"usage": self._usage(ticket, 1), "notes": list(ticket.notes)}
    return _sse(f"{kind}.completed", body)

  def _image(
      self, ticket: Ticket, event: Completed, base: str
  ) -> dict[str, Any]:
    """Returns an image as the reply holds it."""
    wanted = ticket.request
    found: dict[str, Any] = dict(
        seed=wanted.seed, passes=event.passes,
        seconds=round(event.seconds, 4), decoder=wanted.label,
        lossless=wanted.decoder.is_lossless(self._scheduler.grid))
    if wanted.as_url:
      name = self._files.put(event.file, wanted.output_format)
      return found | {"url": f"{base}v1/images/files/{name}"}
    return found | {"b64_json": base64.b64encode(event.file).decode()}

  def _common(self, wanted: ImageRequest) -> dict[str, Any]:
    return dict(output_format=wanted.output_format, size=self._served.size,
                quality="auto", background="opaque")

  def _usage(self, ticket: Ticket, images: int) -> dict[str, Any]:
    """Counts tokens: those of the prompt, and an image's."""
    text = int(np.sum(ticket.prompt.mask[0]))
    drawn = images * self._scheduler.grid.num_tokens
    return dict(
        input_tokens=text, output_tokens=drawn, total_tokens=text + drawn,
        input_tokens_details=dict(text_tokens=text, image_tokens=0))

  def _model(self, name: str) -> dict[str, Any]:
    return dict(id=name, object="model", created=self._started,
                owned_by="ssd_jax")

  def _json_response(self, body: dict[str, Any]) -> Any:
    return self._responses.Response(
        json.dumps(body), media_type="application/json")

  # --- requests

  def _check_key(self, request: Any) -> None:
    """Raises ApiError unless the client shows the key, if there is one."""
    if self._key is None:
      return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.encode(), self._key.encode())
    if scheme.lower() != "bearer" or not is_right:
      raise ApiError(401, "Expected the server's key as Authorization: Bearer "
                          "KEY, got none or another.", "authentication_error",
                     code="invalid_api_key")

  async def _json(self, request: Any) -> Any:
    """Returns the body's JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind.lower() != "application/json":
      raise ApiError(415, "Expected Content-Type: application/json, got "
                          f"{kind[:40]!r}.")
    body, most = b"", self._served.limits.body
    async for part in request.stream():
      body += part
      if len(body) > most:
        raise ApiError(413, f"Expected a body of at most {most} bytes, got "
                            "more.")
    try:
      return json.loads(body)
    except (ValueError, RecursionError) as error:
      raise ApiError(400, "Expected JSON, got another body.") from error


async def _within(body: Coroutine[Any, Any, T]) -> T:
  """Returns what a client sends; raises ApiError if that takes too long."""
  try:
    return await asyncio.wait_for(body, _BODY_SECONDS)
  except TimeoutError as error:
    raise ApiError(408, f"Expected the whole body within {_BODY_SECONDS:g} "
                        "seconds, got a part.", code="timeout") from error


async def _when_left(
    request: Any, events: asyncio.Queue[Event | None]
) -> None:
  """Puts None among the events when the client closes its connection."""
  while (await request.receive())["type"] != "http.disconnect":
    pass
  events.put_nowait(None)


def _sse(kind: str, body: dict[str, Any]) -> bytes:
  """Encodes a server-sent event."""
  text = json.dumps({"type": kind, **body})
  return f"event: {kind}\ndata: {text}\n\n".encode()


def _client(request: Any) -> str:
  """Returns what tells clients apart in the queue: a key or an address."""
  key = request.headers.get("authorization", "")
  return key or (request.client.host if request.client else "")
