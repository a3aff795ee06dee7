"""The live page's server: what is asked is checked, and nothing is lost."""

import concurrent.futures
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request

from hypothesis import given, settings, strategies as st
import numpy as np
from PIL import Image
import pytest
import uvicorn

from ssd_jax.core.config import UserError
from ssd_jax.decoding.ar import AR
from ssd_jax.serving import jobs, server
from ssd_jax.serving.jobs import Limits
from ssd_jax.serving.studio import Busy, Worker
from tests.support import chains

DECODERS = ("ar", "sjd:window=4", "zipar:window=2")


@pytest.fixture(scope="module")
def site():
  """(address, studio) of a page with a model that needs no time."""
  studio = Worker(chains.pipeline())
  listener = socket.socket()
  listener.bind(("127.0.0.1", 0))
  app = server.make_app(studio, ["127.0.0.1"])
  web = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
  thread = threading.Thread(target=web.run, args=([listener],), daemon=True)
  thread.start()
  while not web.started:
    time.sleep(0.01)
  yield f"http://127.0.0.1:{listener.getsockname()[1]}", studio
  web.should_exit = True
  thread.join()
  studio.close()


def ask(site, path, body=None, **headers):
  """(status, headers, bytes) of a request."""
  if body is not None and not isinstance(body, bytes):
    body = json.dumps(body).encode()
    headers.setdefault("Content-Type", "application/json")
  request = urllib.request.Request(site[0] + path, body, headers)
  try:
    with urllib.request.urlopen(request, timeout=60) as answer:
      return answer.status, answer.headers, answer.read()
  except urllib.error.HTTPError as error:
    return error.code, error.headers, error.read()


def finish(site, values):
  """The last report of a request, once it is over."""
  status, _, body = ask(site, "/api/jobs", values)
  assert status == 202, body
  job = json.loads(body)
  while job["state"] in ("queued", "drawing"):
    time.sleep(0.05)
    job = json.loads(ask(site, f"/api/jobs/{job['id']}")[2])
  return job


@pytest.mark.slow
def test_many_clients_lose_nothing(site):
  """Requests of many at once are all generated, in batches, each its own."""
  pipe = chains.pipeline()
  wanted = [dict(prompt=f"picture {i}", decoder=DECODERS[i % 3], seed=i % 7,
                 race=i % 10 == 0, images=1 + i % 2) for i in range(30)]
  with concurrent.futures.ThreadPoolExecutor(8) as clients:
    done = list(clients.map(lambda values: finish(site, values), wanted))
  expected = {
      name: pipe.generate(["x"] * 8, name).images for name in DECODERS}
  for values, job in zip(wanted, done, strict=True):
    assert job["state"] == "done" and job["prompt"] == values["prompt"]
    names = [values["decoder"]]
    names += ["ar"] if values["race"] and names != ["ar"] else []
    for name, lane in zip(names, job["lanes"], strict=True):
      for i, picture in enumerate(lane["pictures"]):
        status, headers, png = ask(site, picture["url"])
        assert status == 200 and headers["Content-Type"] == "image/png"
        np.testing.assert_array_equal(
            Image.open(io.BytesIO(png)), expected[name][values["seed"] + i])
        assert np.min(picture["commit"]) == 1
  assert max(lane["together"] for job in done for lane in job["lanes"]) > 1
  gallery = json.loads(ask(site, "/api/gallery")[2])["jobs"]
  assert len(gallery) == 24


@pytest.mark.parametrize("values,named", [
    (None, "request"),
    ([], "request"),
    (dict(prompt="a", more=1), "request"),
    (dict(prompt=""), "prompt"),
    (dict(prompt=3), "prompt"),
    (dict(prompt="x" * 301), "301"),
    (dict(prompt="a", decoder="arr"), "Did you mean"),
    (dict(prompt="a", decoder="sjd:window=0"), "window"),
    (dict(prompt="a", decoder="sjd:window=many"), "many"),
    (dict(prompt="a", decoder="ssd:rounds=1000000000"), "rounds"),
    (dict(prompt="a", decoder="zipar:" + "+" * 200), "decoder"),
    (dict(prompt="a", decoder="eagle"), "drafter"),
    (dict(prompt="a", seed=-1), "seed"),
    (dict(prompt="a", seed=2**40), "seed"),
    (dict(prompt="a", seed=True), "seed"),
    (dict(prompt="a", images=0), "images"),
    (dict(prompt="a", images=5), "images"),
    (dict(prompt="a", guidance=1e9), "guidance"),
    (dict(prompt="a", guidance="nan"), "guidance"),
    (dict(prompt="a", race="yes"), "race"),
])
def test_mistakes_are_one_line(site, values, named):
  """What cannot be generated is refused in one line that names the culprit."""
  status, _, body = ask(
      site, "/api/jobs", b"null" if values is None else values)
  if values is None:
    assert status == 415  # other sites' forms cannot send JSON
    return
  error = json.loads(body)["error"]
  assert status == 400 and named in error and "\n" not in error


@settings(max_examples=200, deadline=None)
@given(st.one_of(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=4),
    st.fixed_dictionaries({}, optional=dict(
        prompt=st.text() | st.integers(),
        decoder=st.text() | st.builds(
            "{}:{}".format, st.sampled_from(["ar", "sjd", "stair", "mtp"]),
            st.text("a=+:,0123456789-windoe.", max_size=20)),
        seed=st.integers() | st.floats(), images=st.integers(),
        guidance=st.floats() | st.none() | st.text(), race=st.booleans()))))
def test_any_json_is_a_request_or_one_line(values):
  """Whatever is sent, it is understood or refused in one line."""
  try:
    request = jobs.parse(values, Limits(), 256)
  except UserError as error:
    assert "Expected " in str(error) and "\n" not in str(error).strip()
    return
  assert 0 < len(request.prompt) <= 300 and 1 <= request.images <= 4
  assert request.race is False or request.decoder != AR()


def test_nothing_else_is_served(site):
  """No file of the disk, no other host's name, no long body; strict headers."""
  status, headers, body = ask(site, "/")
  assert status == 200 and b"<title>" in body
  assert "script-src 'self'" in headers["Content-Security-Policy"]
  assert headers["X-Content-Type-Options"] == "nosniff"
  for path in ("/setup.cfg", "/../setup.cfg", "/page/index.html",
               "/pictures/../0/0.png", "/pictures/x/0/0.png",
               "/pictures/x/-1/0.png", "/bench/pareto.png", "/api/jobs/x"):
    assert ask(site, path)[0] == 404, path
  assert ask(site, "/", Host="evil.example")[0] == 400
  assert ask(site, "/api/jobs", b"{}")[0] == 415
  assert ask(site, "/api/jobs", dict(prompt="x" * 20_000))[0] == 413


def test_a_full_queue_turns_away():
  """More than may wait are reported so at once; those that wait are
  generated."""
  studio = Worker(chains.pipeline(), limits=Limits(waiting=2))
  gate, draw = threading.Event(), studio._generate
  studio._generate = lambda taken: gate.wait() and draw(taken)
  first = studio.submit(dict(prompt="a"))
  while first.state == "queued":
    time.sleep(0.01)
  waiting = [studio.submit(dict(prompt="b", guidance=g)) for g in (2, 3)]
  with pytest.raises(Busy):
    studio.submit(dict(prompt="c"))
  assert studio.report(waiting[1])["ahead"] == 1
  gate.set()
  while any(job.state != "done" for job in [first, *waiting]):
    time.sleep(0.01)
  studio.close()


def test_a_failure_is_reported_and_the_next_job_runs(monkeypatch):
  """What fails inside says so to its visitor; the worker goes on."""
  studio = Worker(chains.pipeline())
  draw = studio._generate

  def fail(taken):
    raise RuntimeError("secret of the machine")

  monkeypatch.setattr(studio, "_generate", fail)
  job = studio.submit(dict(prompt="a"))
  while job.state != "failed":
    time.sleep(0.01)
  assert "secret" not in job.error
  monkeypatch.setattr(studio, "_generate", draw)
  again = studio.submit(dict(prompt="a"))
  while again.state != "done":
    time.sleep(0.01)
  studio.close()
