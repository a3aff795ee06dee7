"""The ASGI application: the API, the page that uses it, and their headers.

No route maps names to files on disk: everything that a visitor may fetch is in
memory under names that the server chooses. The page inserts text as text, and
its policy forbids any script but its own.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import importlib.resources
import json
import pathlib
import secrets
from typing import Any
import urllib.parse

import jax

from ssd_jax.core.config import UserError
from ssd_jax.core.extras import need
from ssd_jax.decoding import registry
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.serving.api import ImagesApi
from ssd_jax.serving.requests import ApiError
from ssd_jax.serving.scheduler import Scheduler
from ssd_jax.storage.files import read_json

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/paint.js": ("paint.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = (
    (b"content-security-policy",
     b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' "
     b"data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
     b"frame-ancestors 'none'; sandbox allow-scripts allow-same-origin "
     b"allow-forms"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
EXAMPLES = ("red heart", "smiling cat face", "pizza", "peach", "money bag",
            "firefighter", "pencil", "angry face with horns")


@dataclasses.dataclass(frozen=True)
class Bench:
  """Results of infer.benchmark that the page shows.

  Attributes:
    rows: A result for each decoder.
    plot: PNG of speed against what is lost, or None.
  """

  rows: Sequence[Mapping[str, Any]] = ()
  plot: bytes | None = None


def read_bench(folder: str | None) -> Bench:
  """Reads the output folder of infer.benchmark; without one there is nothing.

  Raises:
    UserError: if the folder holds no results.
  """
  if folder is None:
    return Bench()
  file = pathlib.Path(folder) / "results.json"
  plot = file.with_name("pareto.png")
  keys = ("decoder", "settings", "seed", "lossless", "pass_ratio",
          "latency_ratio", "nll_gap")
  try:
    found = read_json(file)["rows"]
    rows = [{key: row[key] for key in keys} for row in found]
  except (KeyError, TypeError) as error:
    raise UserError(
        f"Expected results of infer.benchmark, got {file} without results. "
        "Name its output folder with --bench.") from error
  return Bench(rows, plot.read_bytes() if plot.is_file() else None)


def make_app(
    scheduler: Scheduler, pipe: Pipeline, hosts: list[str],
    key: str | None = None, bench: Bench | None = None,
) -> Any:
  """Returns the ASGI application.

  Args:
    scheduler: Generates the images.
    pipe: The model.
    hosts: Allowed host names, which prevents scripts and forms of other sites
      from reaching the server; ["*"] allows any.
    key: Key that clients of the API must show, or None.
    bench: What `read_bench` returned, or None.

  Raises:
    UserError: if packages are missing.
  """
  applications = need("starlette.applications", "serve")
  exceptions = need("starlette.exceptions", "serve")
  requests = need("starlette.requests", "serve")
  page = _Page(scheduler, pipe, bench or Bench())
  app = applications.Starlette(
      routes=[*ImagesApi(scheduler, pipe, key).routes(), *page.routes()],
      exception_handlers={
          ApiError: lambda request, error: _refuse(scheduler, error),
          requests.ClientDisconnect: lambda request, error: _refuse(
              scheduler, ApiError(
                  400, "Expected a whole body, got a client that left.")),
          exceptions.HTTPException: lambda request, error: _refuse(
              scheduler, _no_route(request, error), error.headers),
          Exception: lambda request, error: _refuse(scheduler, ApiError(
              500, "Expected to answer this request, got an error of the "
              "server.", "server_error", code="internal_error")),
      })
  return _Headers(app if "*" in hosts else _OwnNames(app, scheduler, hosts))


def _no_route(request: Any, error: Any) -> ApiError:
  """Returns the error for a path or method that is not served."""
  allowed = (error.headers or {}).get("Allow")
  expected, code = ((f"{allowed} for this path", "method_not_allowed")
                    if allowed else ("a path that is served", "not_found"))
  return ApiError(
      error.status_code, f"Expected {expected}, got {request.method} "
      f"{request.url.path[:60]!r}. See /openapi.json.", code=code)


def _refuse(
    scheduler: Scheduler, error: ApiError,
    more: Mapping[str, str] | None = None,
) -> Any:
  """Returns an error in the API's shape, with more headers."""
  responses = need("starlette.responses", "serve")
  scheduler.metrics.refused.labels(str(error.status)).inc()
  headers = dict(more or {})
  if error.retry_after is not None:
    headers["Retry-After"] = str(error.retry_after)
  elif error.status >= 500:  # it would fail again
    headers["x-should-retry"] = "false"
  return responses.Response(
      json.dumps(error.body()), error.status, headers=headers,
      media_type="application/json")


class _Headers:
  """Adds headers to every answer: what a browser may do, and an id."""

  def __init__(self, app: Any):
    self._app = app

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    async def with_headers(message: Any) -> None:
      if message["type"] == "http.response.start":
        name = f"req_{secrets.token_hex(12)}".encode()
        message["headers"] = [
            *message["headers"], *_HEADERS, (b"x-request-id", name)]
      await send(message)

    await self._app(scope, receive, with_headers)


class _OwnNames:
  """Refuses what other sites make a browser of this machine ask.

  Such a site may give this machine a name of its own, which Host shows, or send
  a form, whose Origin is the site.
  """

  def __init__(self, app: Any, scheduler: Scheduler, hosts: Sequence[str]):
    self._app, self._scheduler, self._hosts = app, scheduler, hosts
    self._datastructures = need("starlette.datastructures", "serve")

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    error = self._error(scope) if scope["type"] == "http" else None
    app = self._app if error is None else _refuse(self._scheduler, error)
    await app(scope, receive, send)

  def _error(self, scope: Any) -> ApiError | None:
    headers = self._datastructures.Headers(scope=scope)
    host, origin = headers.get("host", ""), headers.get("origin")
    if _host_name(f"//{host}") not in self._hosts:
      return ApiError(400, f"Expected one of {', '.join(self._hosts)} as Host, "
                           f"got {host[:60]!r}.", code="invalid_host")
    is_read = scope["method"] in ("GET", "HEAD")
    if origin is None or is_read or _host_name(origin) in self._hosts:
      return None
    return ApiError(403, "Expected a client or page of this machine, got one "
                         f"of {origin[:60]!r}.", code="invalid_origin")


def _host_name(url: str) -> str | None:
  """Returns the name or address in a URL, or None if there is none."""
  try:
    parts = urllib.parse.urlsplit(url)
    _ = parts.port  # raises if it is none
  except ValueError:
    return None
  is_name = "@" not in parts.netloc and not any(map(str.isspace, url))
  return parts.hostname if is_name else None


class _Page:
  """The live page and what it asks beside the API."""

  def __init__(self, scheduler: Scheduler, pipe: Pipeline, bench: Bench):
    self._scheduler, self._pipe, self._bench = scheduler, pipe, bench
    self._responses = need("starlette.responses", "serve")
    folder = importlib.resources.files("ssd_jax.serving") / "page"
    self._files = {
        path: ((folder / name).read_bytes(), kind)
        for path, (name, kind) in _PAGE.items()}

  def routes(self) -> list[Any]:
    """Returns Starlette's routes."""
    route = need("starlette.routing", "serve").Route
    return [*(route(path, self.file) for path in _PAGE),
            route("/info", self.info), route("/bench/pareto.png", self.pareto)]

  async def file(self, request: Any) -> Any:
    """Returns the page or one of its files."""
    body, kind = self._files[request.url.path]
    return self._responses.Response(body, media_type=kind)

  async def info(self, request: Any) -> Any:
    """Returns the model, device, decoders and limits."""
    return self._responses.JSONResponse(
        _info(self._scheduler, self._pipe) | {"bench": self._bench.rows})

  async def pareto(self, request: Any) -> Any:
    """Returns the plot of the benchmark."""
    if self._bench.plot is None:
      raise ApiError(404, "Expected a benchmark, got none. Start with --bench "
                          "DIR.", code="not_found")
    return self._responses.Response(
        self._bench.plot, media_type="image/png")


def _info(scheduler: Scheduler, pipe: Pipeline) -> dict[str, Any]:
  grid, served = pipe.model.grid, scheduler.served
  known = registry.DECODERS if served.parse else {}
  labels = dict.fromkeys([*served.decoders, *known])
  decoders = []
  for label in labels:
    decoder = served.decoders.get(label) or known[label]()
    decoders.append(dict(
        name=label, lossless=decoder.is_lossless(grid),
        missing=decoder.needs(pipe.model).missing(pipe.model),
        settings=[dict(key=f.name, default=str(f.default))
                  for f in dataclasses.fields(decoder)]  # type: ignore
        if served.parse and label in known else []))
  return dict(
      model=served.names[0], rows=grid.rows, cols=grid.cols,
      device=jax.devices()[0].device_kind, decoders=decoders,
      guidance=float(pipe.family.sampling["guidance"]),
      limits=dict(prompt=served.limits.prompt, images=served.limits.images),
      examples=EXAMPLES)
