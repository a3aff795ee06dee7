"""Worker thread that batches equal requests, generates and reports progress."""

import collections
from collections.abc import Sequence
import dataclasses
import logging
import threading
import time
from typing import Any

import numpy as np

from ssd_jax.core.config import UserError
from ssd_jax.core.outputs import Output
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding.ar import AR
from ssd_jax.evaluation import benchmark
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.runtime.progress import Progress
from ssd_jax.serving.jobs import Job, Lane, Limits, Picture, Request, parse

_SHARE = 0.1  # largest share of time spent on previews
_LEAST = 0.25  # least seconds between previews


class Busy(Exception):
  """Raised if too many requests wait."""


class Worker:
  """Generates requests in order of arrival, batching those of equal settings.

  Attributes:
    pipe: The model.
    limits: Limits of requests.
    batch: Images generated together.
    drawn: Images generated so far.
  """

  def __init__(
      self, pipe: Pipeline, batch: int = 4, limits: Limits = Limits()
  ):
    self.pipe, self.limits, self.batch = pipe, limits, batch
    self.drawn = 0
    self._shape = pipe.model.grid.slot_of.shape
    self._waiting: collections.deque[Job] = collections.deque()
    self._jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
    self._lossless: collections.OrderedDict[Any, bool] = (
        collections.OrderedDict())
    self._change, self._tracing = threading.Condition(), threading.Lock()
    self._programs: set[Any] = set()
    self._is_open = True
    self._worker = threading.Thread(target=self._work, daemon=True)
    self._worker.start()

  def submit(self, values: Any) -> Job:
    """Queues the request in a visitor's JSON and returns its job.

    Raises:
      UserError: if the request is invalid or cannot be generated.
      Busy: if too many requests wait.
    """
    request = parse(values, self.limits, self.pipe.model.grid.num_tokens)
    lossless = self._check(request)
    make_lane = lambda label, is_lossless: Lane(label, is_lossless, [
        Picture(np.zeros(self._shape, int)) for _ in range(request.images)])
    lanes = [make_lane(request.label, lossless)]
    if request.race:
      lanes.append(make_lane("ar", True))
    job = Job(request, lanes)
    with self._change:
      if len(self._waiting) >= self.limits.waiting:
        raise Busy
      self._waiting.append(job)
      self._jobs[job.id] = job
      self._forget()
      self._change.notify_all()
    return job

  def find(self, name: str) -> Job | None:
    """Returns the job with the id `name`, or None if it is not kept."""
    return self._jobs.get(name)

  def report(self, job: Job) -> dict[str, Any]:
    """Returns the progress of a job as JSON."""
    with self._change:
      ahead = self._waiting.index(job) if job in self._waiting else 0
      return job.report(ahead)

  def finished(self, count: int) -> list[Job]:
    """Returns up to `count` finished jobs, latest first."""
    with self._change:
      done = [job for job in self._jobs.values() if job.state == "done"]
    return done[-count:][::-1]

  def close(self) -> None:
    """Stops the worker after its current batch."""
    with self._change:
      self._is_open = False
      self._change.notify_all()
    self._worker.join()

  def _check(self, request: Request) -> bool:
    """Returns whether the decoder is lossless; traces it to find errors early.

    Raises:
      UserError: if this model or grid cannot run the decoder.
    """
    key = request.decoder, request.guidance == 1.0
    with self._tracing:
      if key not in self._lossless:
        job = benchmark.Job(
            (request.prompt,), sampling={"guidance": request.guidance})
        traits = benchmark.traits(self.pipe, request.decoder, job)
        self._lossless[key] = traits.is_lossless
        while len(self._lossless) > 10 * self.limits.decoders:
          self._lossless.popitem(last=False)
      return self._lossless[key]

  def _forget(self) -> None:
    """Drops the oldest ended jobs beyond the limit."""
    ended = [k for k, j in self._jobs.items() if j.state in ("done", "failed")]
    for name in ended[:max(len(self._jobs) - self.limits.kept, 0)]:
      del self._jobs[name]

  def _work(self) -> None:
    while True:
      with self._change:
        self._change.wait_for(lambda: self._waiting or not self._is_open)
        if not self._is_open:
          return
        jobs = self._take()
      try:
        self._generate(jobs)
        state, error = "done", ""
      except UserError as mistake:
        state, error = "failed", str(mistake)
      except Exception:  # the worker must survive for the next request
        logging.exception("a request failed")
        state = "failed"
        error = "This request could not be generated. Try other settings."
      with self._change:
        for job in jobs:
          job.state, job.error = state, error

  def _take(self) -> list[Job]:
    """Returns the oldest waiting job and others of its group that fit."""
    first = self._waiting[0]
    taken, room = [], max(self.batch, first.request.images)
    for job in list(self._waiting):
      r = job.request
      if r.group == first.request.group and r.images <= room:
        taken.append(job)
        room -= r.images
        self._waiting.remove(job)
    for job in taken:
      job.state = "drawing"
    return taken

  def _generate(self, jobs: Sequence[Job]) -> None:
    """Generates the lanes of jobs of one group."""
    decoders = [jobs[0].request.decoder]
    if jobs[0].request.race:
      decoders.append(AR())
    for number, decoder in enumerate(decoders):
      self._make_room(decoder)
      lanes = [job.lanes[number] for job in jobs]
      out = self._generate_lanes(jobs, lanes, decoder)
      for job in jobs:
        job.notes = tuple(n for n in out.notes if job.request.prompt[:40] in n)

  def _make_room(self, decoder: Decoder) -> None:
    """Drops all compiled programs if there are too many."""
    if len(self._programs | {decoder}) > self.limits.decoders:
      self.pipe = dataclasses.replace(self.pipe)
      self._programs.clear()
    self._programs.add(decoder)

  def _generate_lanes(
      self, jobs: Sequence[Job], lanes: Sequence[Lane], decoder: Decoder
  ) -> Output:
    """Generates all jobs with one decoder and updates their lanes."""
    texts = [j.request.prompt for j in jobs for _ in range(j.request.images)]
    index = [j.request.seed + i for j in jobs for i in range(j.request.images)]
    pictures = [p for lane in lanes for p in lane.pictures]
    # Only two batch sizes, so that few programs are compiled.
    size = 1 if len(texts) == 1 else max(self.batch, len(texts))
    fill = size - len(texts)
    for lane in lanes:
      lane.state, lane.together = "compiling", len(texts)
    # Compiled here, before the clock starts.
    self.pipe.decode_images(np.zeros((size, *self._shape), int), size)
    previews = _Previews(self.pipe, pictures, size)

    def on_pass(progress: Progress) -> None:
      new = progress.is_final[:len(pictures)]
      for picture, is_final_RC in zip(pictures, new, strict=True):
        is_new = is_final_RC & (picture.commit == 0)
        picture.commit = np.where(is_new, progress.passes, picture.commit)
      for lane in lanes:
        lane.state, lane.passes = "drawing", int(lane.pictures[0].commit.max())
      previews.show(progress.tokens)

    with previews:
      out = self.pipe.generate(
          texts + texts[-1:] * fill, decoder, batch=size, on_pass=on_pass,
          first_image=index + index[-1:] * fill,
          guidance=jobs[0].request.guidance)
    done = zip(pictures, out.images, out.commit_pass, strict=False)
    for picture, image, commit_RC in done:
      picture.commit = commit_RC
      picture.paint(image)
    for lane in lanes:
      lane.passes = int(lane.pictures[0].commit.max())
      lane.seconds, lane.state = out.seconds, "done"
    self.drawn += len(texts)
    return out


class _Previews:
  """Thread that decodes unfinished grids, in a small share of the time."""

  def __init__(self, pipe: Pipeline, pictures: Sequence[Picture], size: int):
    self._pipe, self._pictures, self._size = pipe, pictures, size
    self._tokens: np.ndarray | None = None
    self._change, self._is_open = threading.Condition(), True
    self._thread = threading.Thread(target=self._work, daemon=True)

  def show(self, tokens_BRC: np.ndarray) -> None:
    """Sets the latest grids, which are decoded next."""
    with self._change:
      self._tokens = tokens_BRC
      self._change.notify_all()

  def __enter__(self) -> "_Previews":
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    with self._change:
      self._is_open = False
      self._change.notify_all()
    self._thread.join()

  def _work(self) -> None:
    while True:
      with self._change:
        self._change.wait_for(
            lambda: self._tokens is not None or not self._is_open)
        if self._tokens is None or not self._is_open:
          return
        tokens, self._tokens = self._tokens, None
      start = time.monotonic()
      images = self._pipe.decode_images(tokens, self._size)
      for picture, image in zip(self._pictures, images, strict=False):
        picture.paint(image)
      pause = max((time.monotonic() - start) / _SHARE, _LEAST)
      with self._change:
        self._change.wait_for(lambda: not self._is_open, pause)
