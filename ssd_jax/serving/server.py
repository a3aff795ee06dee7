"""HTTP routes of the demo page.

No route maps names to files on disk: everything that a visitor may fetch is in
memory under names that the server chooses. The page inserts text as text, and
its policy forbids any script but its own.
"""

import dataclasses
import importlib.resources
import json
import pathlib
from typing import Any

import jax

from ssd_jax.core.config import UserError
from ssd_jax.core.extras import need
from ssd_jax.decoding import registry
from ssd_jax.serving.studio import Busy, Worker
from ssd_jax.storage.files import read_json

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/paint.js": ("paint.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src "
        "'self' data:; connect-src 'self'; base-uri 'none'; form-action "
        "'none'; frame-ancestors 'none'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LARGEST_BODY = 16_384
_GALLERY = 24
EXAMPLES = ("red heart", "smiling cat face", "pizza", "peach", "money bag",
            "firefighter", "pencil", "angry face with horns")


def make_app(studio: Worker, hosts: list[str], bench: str | None = None) -> Any:
  """Returns the ASGI application.

  Args:
    studio: Worker that generates images.
    hosts: Allowed host names, which prevents scripts of other sites from
      reaching the server by a name of their own; ["*"] allows any.
    bench: Output folder of infer.benchmark to show, or None.

  Raises:
    UserError: if the folder holds no results or packages are missing.
  """
  applications = need("starlette.applications", "demo")
  routing = need("starlette.routing", "demo")
  middleware = need("starlette.middleware", "demo")
  trusted = need("starlette.middleware.trustedhost", "demo")
  service = _Service(studio, bench)
  route = routing.Route
  return applications.Starlette(
      routes=[
          *(route(path, service.page) for path in _PAGE),
          route("/api/info", service.info),
          route("/api/jobs", service.submit, methods=["POST"]),
          route("/api/jobs/{name}", service.job),
          route("/api/gallery", service.gallery),
          route("/pictures/{name}/{lane:int}/{index:int}.png", service.picture),
          route("/bench/pareto.png", service.pareto),
      ],
      middleware=[middleware.Middleware(
          trusted.TrustedHostMiddleware, allowed_hosts=hosts)])


class _Service:
  """Handlers of the routes."""

  def __init__(self, studio: Worker, bench: str | None):
    self.studio = studio
    self.responses = need("starlette.responses", "demo")
    self.bench = _read_bench(bench)
    folder = importlib.resources.files("ssd_jax.serving") / "page"
    self.files = {
        path: ((folder / name).read_bytes(), kind)
        for path, (name, kind) in _PAGE.items()}

  def answer(
      self, body: bytes | dict, kind: str = "application/json",
      status: int = 200,
  ) -> Any:
    """Returns a response with the common headers."""
    if isinstance(body, dict):
      body = json.dumps(body).encode()
    return self.responses.Response(
        body, status, headers=_HEADERS, media_type=kind)

  def refuse(self, status: int, error: str) -> Any:
    """Returns an error of one line that the page shows."""
    return self.answer({"error": error}, status=status)

  async def page(self, request) -> Any:
    """Returns the page or one of its files."""
    return self.answer(*self.files[request.url.path])

  async def info(self, request) -> Any:
    """Returns the model, device, decoders and limits."""
    return self.answer(_info(self.studio) | {"bench": self.bench["rows"]})

  async def submit(self, request) -> Any:
    """Queues a request, or returns an error of one line."""
    if request.headers.get("content-type", "").split(";")[0] != (
        "application/json"):
      return self.refuse(415, "Expected JSON, got another type. Use the page.")
    body = b""
    async for part in request.stream():
      body += part
      if len(body) > _LARGEST_BODY:
        return self.refuse(
            413, "Expected a short request, got one that is too long.")
    to_thread = need("anyio.to_thread", "demo")
    try:
      job = await to_thread.run_sync(self.studio.submit, json.loads(body))
    except UserError as error:
      return self.refuse(400, str(error))
    except (ValueError, RecursionError):
      return self.refuse(
          400, "Expected JSON, got another body. Use the page.")
    except Busy:
      return self.refuse(
        503, "Expected fewer requests, got more than can wait. Try again later."
      )
    return self.answer(self.studio.report(job), status=202)

  async def job(self, request) -> Any:
    """Returns the progress of a job."""
    job = self.studio.find(request.path_params["name"])
    if job is None:
      return self.refuse(
        404,
        "Expected a recent request, got one that is gone. Generate it again.",
      )
    return self.answer(self.studio.report(job))

  async def gallery(self, request) -> Any:
    """Returns the latest finished jobs."""
    done = self.studio.finished(_GALLERY)
    return self.answer({"jobs": [self.studio.report(job) for job in done]})

  async def picture(self, request) -> Any:
    """Returns an image, finished or in progress."""
    job = self.studio.find(request.path_params["name"])
    try:
      lanes = job.lanes if job else []
      lane = lanes[request.path_params["lane"]]
      png = lane.pictures[request.path_params["index"]].png
    except (AttributeError, IndexError):
      png = None
    if png is None:
      return self.refuse(404, "Expected an image, got no image at this URL.")
    return self.answer(png, "image/png")

  async def pareto(self, request) -> Any:
    """Returns the plot of the benchmark."""
    if self.bench["plot"] is None:
      return self.refuse(
        404, "Expected a benchmark, got none. Start with --bench DIR."
      )
    return self.answer(self.bench["plot"], "image/png")


def _info(studio: Worker) -> dict[str, Any]:
  pipe, grid = studio.pipe, studio.pipe.model.grid
  device = jax.devices()[0]
  decoders = [
      dict(name=name, lossless=cls().is_lossless(grid),
           missing=cls().needs(pipe.model).missing(pipe.model),
           settings=[dict(key=f.name, default=str(f.default))
                     for f in dataclasses.fields(cls)])
      for name, cls in registry.DECODERS.items()]
  return dict(
      model=pipe.family.name, rows=grid.rows, cols=grid.cols,
      device=device.device_kind, decoders=decoders,
      guidance=float(pipe.family.sampling["guidance"]),
      limits=dataclasses.asdict(studio.limits), examples=EXAMPLES)


def _read_bench(folder: str | None) -> dict[str, Any]:
  """Returns {"rows": results, "plot": PNG or None}; empty without a folder."""
  if folder is None:
    return {"rows": [], "plot": None}
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
  return {"rows": rows, "plot": plot.read_bytes() if plot.is_file() else None}
