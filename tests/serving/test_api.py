"""The Images API over HTTP, by OpenAI's own client and by hand."""

import base64
import concurrent.futures
import io
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import openai
from PIL import Image
import pytest
import uvicorn

from ssd_jax.cli import serve
from ssd_jax.core.config import UserError
from ssd_jax.decoding import registry
from ssd_jax.serving import api, app, batches, lanes
from tests.support import chains, served

DECODERS = ("ar", "zipar:window=2")


@pytest.fixture(scope="module")
def pipe():
  return chains.pipeline(8, 8)


@pytest.fixture(scope="module")
def site(pipe):
  """(address, scheduler) of a model that needs no time."""
  with served.site(pipe, DECODERS, images=4) as found:
    yield found


@pytest.fixture
def client(site):
  return openai.OpenAI(base_url=site[0] + "/v1", api_key="none", max_retries=0)


def pixels(b64):
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def ask(site, path, body=None, **headers):
  """(status, headers, bytes) of a request."""
  if body is not None and not isinstance(body, bytes):
    body = json.dumps(body).encode()
  if body is not None:
    headers.setdefault("Content-Type", "application/json")
  request = urllib.request.Request(site[0] + path, body, headers)
  try:
    with urllib.request.urlopen(request, timeout=60) as answer:
      return answer.status, answer.headers, answer.read()
  except urllib.error.HTTPError as error:
    return error.code, error.headers, error.read()


def generations(site, **values):
  status, headers, body = ask(site, "/v1/images/generations", values)
  return status, headers, json.loads(body)


def post(site, length=None, **values):
  """The connection of a request, whose body may be shorter than it says."""
  raw = socket.create_connection(site[0].removeprefix("http://").split(":"))
  raw.settimeout(60)
  body = json.dumps(values)
  raw.sendall(
      "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
      "Content-Type: application/json\r\n"
      f"Content-Length: {length or len(body)}\r\n\r\n{body}".encode())
  return raw


def wait_for(site, line):
  """Returns once a metric has a value."""
  deadline = time.monotonic() + 20
  while f"ssd_jax_{line}\n".encode() not in ask(site, "/metrics")[2]:
    assert time.monotonic() < deadline, line
    time.sleep(0.01)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_official_client_gets_what_generate_makes(client, pipe, decoder):
  """n images of a seed, with usage; each is the pipeline's, to the pixel."""
  reply = client.images.generate(
      prompt="red heart", model="greys", n=3, size="auto", quality="high",
      user="somebody", extra_body=dict(seed=5, decoder=decoder))
  expected = pipe.generate(["red heart"], decoder, num_images=3, seed=5)
  assert reply.size == "16x16" and reply.usage.output_tokens == 3 * 64
  for image, drawn, passes in zip(
      reply.data, expected.images, expected.passes, strict=True):
    np.testing.assert_array_equal(pixels(image.b64_json), drawn)
    assert (image.seed, image.passes) == (5, passes)
    assert image.lossless == (decoder == "ar")


def test_partial_images_come_before_the_finished_one(
    client, pipe, monkeypatch):
  """Events in the API's order; the last is the picture, with usage."""
  monkeypatch.setattr(lanes, "_MOST_PASSES", 4)
  events = list(client.images.generate(
      prompt="a", stream=True, partial_images=2, extra_body=dict(seed=1)))
  assert [event.type for event in events] == [
      "image_generation.partial_image"] * 2 + ["image_generation.completed"]
  assert [event.partial_image_index for event in events[:2]] == [0, 1]
  assert events[-1].usage.total_tokens == 1 + 64
  expected = pipe.generate(["a"], seed=1).images[0]
  np.testing.assert_array_equal(pixels(events[-1].b64_json), expected)
  for event in events[:2]:
    assert pixels(event.b64_json).shape == expected.shape


def test_progress_shows_the_order_of_commits(site, monkeypatch):
  """With `progress` every few passes say which tokens are final."""
  monkeypatch.setattr(lanes, "_MOST_PASSES", 4)
  _, headers, body = ask(site, "/v1/images/generations", dict(
      prompt="a", stream=True, progress=True, n=2))
  assert headers["Content-Type"].startswith("text/event-stream")
  events = [json.loads(part.partition("data: ")[2])
            for part in body.decode().split("\n\n") if part]
  for image in (0, 1):
    counts = [np.count_nonzero(event["commit_pass"]) for event in events
              if event["image_index"] == image]
    assert counts == sorted(counts) and counts[-1] == 64 and len(counts) > 2
  assert [e["type"] for e in events].count("image_generation.completed") == 2


def test_files_are_of_the_format_that_was_asked(client, site):
  """JPEG and WebP; a URL serves the same bytes for a while."""
  for kind in ("jpeg", "webp", "png"):
    reply = client.images.generate(
        prompt="a", output_format=kind, response_format="url",
        output_compression=80, extra_body=dict(seed=1))
    status, headers, body = ask(("",), reply.data[0].url)
    assert status == 200 and headers["Content-Type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(body)).format.lower() == kind


@pytest.mark.parametrize("values, error, code", [
    (dict(prompt=""), openai.BadRequestError, None),
    (dict(prompt="a", n=5), openai.BadRequestError, None),
    (dict(prompt="a", size="1024x1024"), openai.BadRequestError, None),
    (dict(prompt="a", model="dall-e-3"), openai.NotFoundError,
     "model_not_found"),
    (dict(prompt="a", extra_body=dict(temperature=-1)),
     openai.BadRequestError, None),
    (dict(prompt="a", extra_body=dict(top_p=2)), openai.BadRequestError, None),
])
def test_errors_are_those_of_the_official_client(client, values, error, code):
  """Its classes, with our message of one line."""
  with pytest.raises(error, match="Expected") as caught:
    client.images.generate(**values)
  assert caught.value.code == code and caught.value.request_id


def test_bodies_that_are_no_request(site, monkeypatch):
  """Wrong types, broken JSON and long bodies get a 4xx error, never a 500; a
  client that leaves in the middle of its body is no error of the server."""
  path = "/v1/images/generations"
  for body, status in ((b"{", 400), (b"\xff", 400), (b"[" * 60_000, 400),
                       (b'{"n": 1' + b"0" * 5000 + b"}", 400), (b"null", 400),
                       (b'{"prompt": "\\ud800"}', 400),
                       (json.dumps({"prompt": "x" * 70_000}).encode(), 413)):
    found, _, answer = ask(site, path, body)
    assert found == status and "Expected" in json.loads(answer)[
        "error"]["message"], body[:20]
  status, _, _ = ask(site, path, b"{}", **{"Content-Type": "text/plain"})
  assert status == 415
  assert ask(site, path)[0] == 405
  assert ask(site, "/v1/images/edits", {})[0] == 415
  refused = lambda: float(re.search(
      r'refused_total{status="400"} (\S+)',
      ask(site, "/metrics")[2].decode())[1])
  before = refused()
  post(site, length=99).close()
  deadline = time.monotonic() + 10
  while refused() == before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert refused() == before + 1
  monkeypatch.setattr(api, "_BODY_SECONDS", 0.05)
  with post(site, length=99) as raw:
    assert raw.recv(12) == b"HTTP/1.1 408"


def test_models_health_and_metrics(client, site):
  """What monitors and clients look at."""
  assert [m.id for m in client.models.list()] == ["greys", "gpt-image-1"]
  assert client.models.retrieve("greys").object == "model"
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve("other")
  assert ask(site, "/health")[0] == ask(site, "/ready")[0] == 200
  client.images.generate(prompt="a")
  text = ask(site, "/metrics")[2].decode()
  for name in ("requests_running", "requests_waiting", "images_total",
               "request_queue_seconds_bucket", "tokens_total",
               "time_to_first_partial_seconds_bucket", "image_passes_total"):
    assert f"\nssd_jax_{name}" in text, name
  document = json.loads(ask(site, "/openapi.json")[2])
  assert document["openapi"] == "3.1.0"


def test_nothing_else_is_served(site):
  """No file of the disk, no other host's name; strict headers on all."""
  status, headers, body = ask(site, "/")
  assert status == 200 and b"<title>" in body
  assert "sandbox" in headers["Content-Security-Policy"]
  assert headers["X-Content-Type-Options"] == "nosniff"
  for path in ("/setup.cfg", "/../setup.cfg", "/page/index.html",
               "/v1/images/files/x.png", "/v1/images/files/..%2f..%2fx",
               "/bench/pareto.png", "/v1/models/..%2f"):
    status, headers, _ = ask(site, path)
    assert status == 404 and headers["X-Request-Id"], path
  for host in ("evil.example", "127.0.0.1@evil.example", "[", "a b", ""):
    status, _, body = ask(site, "/info", Host=host)
    assert status == 400 and b'"invalid_host"' in body, host
  for origin, status in (("https://evil.example", 403), ("null", 403),
                         ("http://127.0.0.1:3000", 415)):
    assert ask(site, "/v1/images/edits", b"", Origin=origin)[0] == status


def test_names_of_hosts():
  """With ports, as IPv6 or in an Origin; None for what is no name."""
  for url, name in (("//[::1]:8000", "::1"), ("//LOCALHOST", "localhost"),
                    ("//localhost:http", None), ("null", None)):
    assert app._host_name(url) == name, url


@pytest.mark.parametrize("key", ["secret\n", "a b", "\udcff", "é"])
def test_a_key_that_no_header_can_hold_is_one_line(monkeypatch, key):
  monkeypatch.setenv("SSD_JAX_API_KEY", key)
  with pytest.raises(UserError, match="visible ASCII") as caught:
    serve._key("127.0.0.1")
  assert key not in str(caught.value)


def test_a_key_guards_the_api(pipe):
  """Without the key no picture; the page and health need none."""
  with served.site(pipe, key="secret") as site:
    assert ask(site, "/health")[0] == ask(site, "/")[0] == 200
    for key in ("", "Bearer other", "Basic secret", "secret"):
      status, _, _ = ask(site, "/v1/models", Authorization=key)
      assert status == 401, key
    client = openai.OpenAI(base_url=site[0] + "/v1", api_key="secret")
    assert client.images.generate(prompt="a").data
    client = openai.OpenAI(base_url=site[0] + "/v1", api_key="é")
    with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
      client.images.generate(prompt="a")


@pytest.mark.slow
def test_a_full_queue_turns_away_and_says_when_to_come_back(pipe):
  """429 with Retry-After; those that were accepted are all drawn."""
  with served.site(pipe, waiting=3, images=3, batch=1) as site:
    with concurrent.futures.ThreadPoolExecutor(30) as clients:
      found = list(clients.map(
          lambda seed: generations(site, prompt="a", seed=seed, n=2),
          range(30)))
  statuses = [status for status, _, _ in found]
  assert set(statuses) == {200, 429}
  for status, headers, body in found:
    if status == 429:
      assert int(headers["Retry-After"]) >= 1
      assert body["error"]["code"] == "queue_full"
    else:
      assert len(body["data"]) == 2


def test_a_client_that_leaves_frees_its_slots(pipe, monkeypatch):
  """One that closes its stream, or waits for a whole reply while passes go on:
  the rest is not drawn."""
  monkeypatch.setattr(lanes, "_MOST_PASSES", 1)
  with served.site(pipe, batch=1, images=4) as site:
    client = openai.OpenAI(base_url=site[0] + "/v1", api_key="none")
    stream = client.images.generate(
        prompt="a", n=4, stream=True, extra_body=dict(progress=True))
    next(iter(stream))
    stream.close()
    wait_for(site, 'requests_total{finished_reason="cancelled"} 1.0')
    advance = batches.Batches.advance
    with monkeypatch.context() as patch:
      patch.setattr(batches.Batches, "advance",
                    lambda *args: time.sleep(0.05) or advance(*args))
      with post(site, prompt="a", n=4, progress=True):
        wait_for(site, "requests_running 1.0")
      wait_for(site, 'requests_total{finished_reason="cancelled"} 2.0')
    assert client.images.generate(prompt="b").data


def test_a_decoder_that_cannot_be_compiled_is_told(pipe, monkeypatch):
  """To the client that asks for it; one that is always served ends all."""
  opened = batches.Batches.open

  def refuse(self, key, item):
    if key.decoder.name != "ar":
      raise UserError("Expected lookahead to be more, got less.")
    opened(self, key, item)

  monkeypatch.setattr(batches.Batches, "open", refuse)
  with served.site(pipe, batch=1, any_decoder=True) as site:
    status, _, body = generations(site, prompt="a", decoder="stair")
    assert status == 400 and "lookahead" in body["error"]["message"]
    assert generations(site, prompt="a")[0] == 200
    scheduler = site[1]
    server = uvicorn.Server(uvicorn.Config(None))
    scheduler.served.decoders["stair"] = registry.parse("stair")
    monkeypatch.setattr(server, "run", lambda _: scheduler._on_no_lane(
        scheduler._defaults()[-1], UserError("Expected lookahead.")))
    with pytest.raises(UserError, match="lookahead"):
      serve.run_until_signal(server, scheduler, [], 1)
    assert server.should_exit and ask(site, "/health")[0] == 503


def test_a_wrong_guess_of_an_images_time_is_mended(pipe):
  """What is thought too slow is tried when nothing else waits."""
  with served.site(pipe, batch=1) as site:
    site[1]._seconds_per_image = 1e9
    assert generations(site, prompt="a")[0] == 200
    assert site[1]._seconds_per_image < 1e9


def test_a_deadline_is_told(pipe):
  """504, and no second try of the client."""
  with served.site(pipe, batch=1, seconds=1e-3) as site:
    status, headers, body = generations(site, prompt="a")
    assert status == 504 and headers["x-should-retry"] == "false"
    assert body["error"]["code"] == "timeout"


def test_a_failure_is_told_and_the_next_request_is_drawn(pipe, monkeypatch):
  """What fails inside says so, without what is inside; the server goes on."""
  with served.site(pipe) as site:
    def fail(*args):
      raise RuntimeError("secret of the machine")
    with monkeypatch.context() as patch:
      patch.setattr(lanes.Lane, "fill", fail)
      _, _, body = generations(site, prompt="a")
      assert body["error"]["type"] == "server_error"
      assert "secret" not in json.dumps(body)
    assert generations(site, prompt="a")[0] == 200
    with monkeypatch.context() as patch:  # after the image left the queue
      patch.setattr(batches.Batches, "insert", fail)
      assert generations(site, prompt="a", n=2)[0] == 500
    assert generations(site, prompt="a")[0] == 200
    with monkeypatch.context() as patch:
      patch.setattr("ssd_jax.serving.scheduler.encode_file", fail)
      assert generations(site, prompt="a")[0] == 500
    assert generations(site, prompt="a")[0] == 200


def test_draining_finishes_what_was_accepted(pipe):
  """Requests that run are drawn, later ones get 503, and it is not ready."""
  with served.site(pipe, batch=1, images=4) as site:
    answers = []
    clients = [threading.Thread(target=lambda: answers.append(
        generations(site, prompt="a", n=4))) for _ in range(3)]
    for each in clients:
      each.start()
    while not site[1]._count_running():
      time.sleep(0.001)
    assert site[1].drain(60)
    for each in clients:
      each.join()
    assert {status for status, _, _ in answers} <= {200, 503}
    assert 200 in {status for status, _, _ in answers}
    assert ask(site, "/ready")[0] == 503
    status, headers, _ = generations(site, prompt="a")
    assert status == 503 and headers["Retry-After"]
