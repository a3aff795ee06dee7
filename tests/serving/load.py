"""A server under load: nothing lost, nothing swapped, nothing kept.

    python -m tests.serving.load                  # a model without weights
    python -m tests.serving.load --model emoji --clients 8 --requests 4

Clients with mixed settings, some that vanish, some that send nonsense and one
that reads slowly, ask a server in a process of its own. Each picture is then
compared with that of `Pipeline.generate`; the server is killed and started
again; last come pictures a second beside `Pipeline.generate`. Fails with an
assertion where the server does not do what it promises.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import multiprocessing
import os
import pathlib
import random
import threading
import time

import numpy as np
from PIL import Image

import ssd_jax
from ssd_jax.cli import run as cli
from tests.support import chains, served

DECODERS = {"greys": ("zipar:window=2", "ar"), "emoji": ("stair", "ar")}
NONSENSE = ({}, {"prompt": ""}, {"prompt": "a", "n": 0}, {"prompt": 3},
            {"prompt": "a", "top_p": 7}, {"prompt": "a", "decoder": "x"}, [])
_JSON = {"Content-Type": "application/json"}
_PATH = "/v1/images/generations"
_OTHERS = dict(guidance_scale="guidance", temperature="temperature",
               top_k="top_k", top_p="top_p")  # by their names in `generate`
VALUES = dict(guidance_scale=2.5, temperature=0.8, top_k=9, top_p=0.9)


def pipeline(model):
  """The pipeline that both sides draw with."""
  return chains.pipeline(8, 8, 32) if model == "greys" else ssd_jax.load(model)


def _serve(model, decoders, batch, connection):
  """Body of the server's process."""
  cli._split_cpu(2)  # as infer.serve does
  cli.use_compilation_cache()
  with served.site(pipeline(model), decoders, batch, images=4,
                   waiting=96) as (address, _):
    connection.send(address.removeprefix("http://"))
    connection.recv()


@dataclasses.dataclass
class Server:
  """A server in a process of its own."""

  process: multiprocessing.process.BaseProcess
  address: str
  connection: object

  def ask(self, path, values=None):
    """(status, headers, bytes) of a request."""
    with contextlib.closing(http.client.HTTPConnection(
        self.address, timeout=300)) as connection:
      if values is None:
        connection.request("GET", path)
      else:
        connection.request("POST", path, json.dumps(values), _JSON)
      answer = connection.getresponse()
      return answer.status, answer.headers, answer.read()

  def metric(self, name, label=""):
    """Sum of a metric over its labels, or over those with such a label."""
    lines = self.ask("/metrics")[2].decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines
               if line.startswith(f"ssd_jax_{name}") and label in line)

  def memory(self):
    """Resident memory in MiB."""
    status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024

  def cpu(self):
    """Seconds of processors so far."""
    fields = pathlib.Path(
        f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

  def places(self):
    """(busy, idle) slots, summed over the passes so far."""
    return [self.metric("slot_passes_total", state)
            for state in ("busy", "idle")]


def start(model, decoders, batch):
  """A server that is ready."""
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  process = context.Process(
      target=_serve, args=(model, decoders, batch, theirs))
  process.start()
  assert ours.poll(1200), "the server did not become ready"
  return Server(process, ours.recv(), ours)


def stop(server):
  """Ends a server as its user would."""
  server.connection.send("end")
  server.process.join(60)
  assert server.process.exitcode == 0


def settings_of(decoders, others, number):
  """Settings of a request; few enough that many ask for the same picture."""
  dice = random.Random(number % 60)
  values = dict(prompt=dice.choice(["red heart", "pizza", "smiling cat face"]),
                seed=dice.randrange(5), n=dice.choice([1, 1, 2, 3]),
                decoder=dice.choice(decoders))
  for name, value in others.items():
    if dice.random() < 0.25:
      values[name] = value
  return values


def hashes(files):
  """Digests of the pixels of encoded pictures."""
  return [hashlib.sha256(np.asarray(Image.open(io.BytesIO(
      base64.b64decode(x)))).tobytes()).hexdigest() for x in files]


def events_of(body):
  """Server-sent events."""
  return [json.loads(part.partition("data: ")[2])
          for part in body.decode().split("\n\n") if "data: " in part]


class Load:
  """What clients do, and what came of it."""

  def __init__(self, server, decoders, others):
    self._server, self._decoders, self._others = server, decoders, others
    self.counts = collections.Counter()
    self.seconds, self.drawn = [], []
    self._lock = threading.Lock()

  def visit(self, number):
    """One request; of every twenty one is nonsense and two vanish."""
    values = settings_of(self._decoders, self._others, number)
    kind = number % 20
    if kind == 7:
      status, _, body = self._server.ask(
          _PATH, NONSENSE[number // 20 % len(NONSENSE)])
      assert status == 400 and b"Expected" in body, (status, body)
      return self._count("malformed")
    if kind in (3, 13):
      self._vanish({**values, "stream": kind == 3, "progress": True})
      return self._count("vanished")
    is_stream = number % 3 == 0
    if is_stream:
      values |= dict(stream=True, partial_images=1 + number % 3)
    begin = time.monotonic()
    body = self._patiently(values)
    data = ([x for x in events_of(body) if x["type"].endswith("completed")]
            if is_stream else json.loads(body)["data"])
    data.sort(key=lambda x: x.get("image_index", 0))
    with self._lock:
      self.seconds.append(time.monotonic() - begin)
      self.drawn.append((values, [x["b64_json"] for x in data]))
    return self._count("streamed" if is_stream else "whole")

  def read_slowly(self):
    """A stream of which a few hundred bytes are read at a time."""
    values = settings_of(self._decoders, self._others, 1) | dict(
        n=4, stream=True, partial_images=3)
    with contextlib.closing(http.client.HTTPConnection(
        self._server.address, timeout=300)) as connection:
      connection.request("POST", _PATH, json.dumps(values), _JSON)
      answer, body = connection.getresponse(), b""
      while part := answer.read1(512):
        body += part
        time.sleep(0.005)
    data = [x for x in events_of(body) if x["type"].endswith("completed")]
    data.sort(key=lambda x: x["image_index"])
    with self._lock:
      self.drawn.append((values, [x["b64_json"] for x in data]))
    self._count("slow")

  def check(self, pipe):
    """Compares each picture with that of `generate`."""
    expected = {}
    for values, files in self.drawn:
      wanted = {k: v for k, v in values.items()
                if k not in ("stream", "partial_images")}
      key = json.dumps(wanted, sort_keys=True)
      if key not in expected:
        sampling = {_OTHERS[k]: v for k, v in values.items() if k in _OTHERS}
        out = pipe.generate(
            [values["prompt"]], values["decoder"], num_images=values["n"],
            seed=values["seed"], batch=1, **sampling)
        expected[key] = [
            hashlib.sha256(x.tobytes()).hexdigest() for x in out.images]
      assert hashes(files) == expected[key], wanted

  def _patiently(self, values):
    """The body of an accepted request; who is turned away comes again."""
    while True:
      status, headers, body = self._server.ask(_PATH, values)
      if status == 200:
        return body
      assert status == 429 and int(headers["Retry-After"]) >= 1, body
      self._count("turned away")
      time.sleep(0.3)  # sooner than it was told

  def _vanish(self, values):
    with contextlib.closing(http.client.HTTPConnection(
        self._server.address, timeout=300)) as connection:
      connection.request("POST", _PATH, json.dumps(values), _JSON)
      if values["stream"]:
        connection.getresponse().read1(64)
      else:
        time.sleep(0.02)

  def _count(self, what):
    with self._lock:
      self.counts[what] += 1


@contextlib.contextmanager
def watched(server, every=0.5):
  """Lists that fill with (memory, waiting, busy, idle places) meanwhile."""
  seen, end = [], threading.Event()

  def watch():
    while not end.wait(every):
      seen.append((server.memory(), server.metric("requests_waiting "),
                   *server.places()))

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    yield seen
  finally:
    end.set()
    thread.join()


def mixed(server, pipe, decoders, clients, requests, others=VALUES):
  """Mixed settings, misbehaving clients; then every picture is compared."""
  load = Load(server, decoders, others)
  begin = time.monotonic()
  with watched(server) as seen, concurrent.futures.ThreadPoolExecutor(
      clients + 1) as pool:
    slow = pool.submit(load.read_slowly)
    list(pool.map(load.visit, range(clients * requests)))
    slow.result()
  seconds = time.monotonic() - begin
  load.check(pipe)
  while server.metric("requests_running ") or (
      server.metric("requests_waiting ")):
    time.sleep(0.05)  # those who vanished may have been last
  pictures = sum(len(files) for _, files in load.drawn)
  low, middle, high = np.percentile(load.seconds, (50, 95, 99))
  print(f"{clients} clients x {requests} requests: {dict(load.counts)}; "
        f"{pictures} pictures, each that of generate, {seconds:.0f} s, "
        f"{pictures / seconds:.2f} a second; latency p50 {low:.2f} s, "
        f"p95 {middle:.2f} s, p99 {high:.2f} s")
  memory = np.array([x[0] for x in seen])
  half = memory[len(memory) // 2:]
  if seconds > 60:  # programs are compiled when settings are first met
    quarter = len(half) // 2
    grown = np.median(half[quarter:]) - np.median(half[:quarter])
    print(f"memory of the server {memory[-1]:.0f} MiB, "
          f"{grown:+.1f} MiB from the third to the last quarter")
    assert grown < 0.02 * memory[-1] + 8, memory


def killed(server):
  """Nobody hangs when the server is killed."""
  values = dict(prompt="pizza", n=4)
  with concurrent.futures.ThreadPoolExecutor(32) as pool:
    asked = [pool.submit(server.ask, _PATH, values) for _ in range(32)]
    concurrent.futures.wait(asked, 60, concurrent.futures.FIRST_COMPLETED)
    server.process.kill()
    lost = [x.exception(60) for x in asked]
  assert any(isinstance(x, (OSError, http.client.HTTPException))
             for x in lost), lost
  server.process.join()


def throughput(server, pipe, decoder, batch, pictures):
  """(pictures a second of the server, of `generate` in such batches)."""
  prompts = ["red heart"] * pictures
  pipe.generate(prompts[:batch], decoder, batch=batch)  # compiles
  begin, cpu = time.monotonic(), time.process_time()
  pipe.generate(prompts, decoder, seed=0, batch=batch)
  own, own_cpu = time.monotonic() - begin, time.process_time() - cpu
  ask = lambda seed: server.ask(
      _PATH, dict(prompt=prompts[0], seed=seed, decoder=decoder))[0]
  begin, cpu = time.monotonic(), server.cpu()
  with watched(server) as seen, concurrent.futures.ThreadPoolExecutor(
      3 * batch) as pool:
    assert set(pool.map(ask, range(pictures))) == {200}
  theirs, their_cpu = time.monotonic() - begin, server.cpu() - cpu
  busy = [(b[2] - a[2], b[3] - a[3]) for a, b in zip(seen, seen[1:])
          if a[1] and b[1]]
  used, idle = np.sum(busy, 0) if busy else (0, 1)
  print(f"{pictures} pictures of {decoder}, batches of {batch}: "
        f"{pictures / theirs:.2f} a second over HTTP, {pictures / own:.2f} by "
        f"generate, ratio {own / theirs:.2f}; {their_cpu / pictures:.2f} and "
        f"{own_cpu / pictures:.2f} CPU s a picture; "
        f"{used / (used + idle):.0%} of places busy while somebody waits")
  return pictures / theirs, pictures / own


def run(model, clients, requests, batch, pictures):
  """All of it; returns (pictures a second, those of `generate`)."""
  cli._split_cpu(2)
  cli.use_compilation_cache()
  pipe, decoders = pipeline(model), DECODERS[model]
  server = start(model, decoders, batch)
  try:
    mixed(server, pipe, decoders, clients, requests)
    killed(server)
    server = start(model, decoders, batch)
    mixed(server, pipe, decoders, 4, 5)
    found = throughput(server, pipe, decoders[0], batch, pictures)
    stop(server)
    return found
  finally:
    server.process.kill()


def main():
  """Runs the load and says what came of it."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", default="greys", choices=sorted(DECODERS))
  parser.add_argument("--clients", type=int, default=64)
  parser.add_argument("--requests", type=int, default=20)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--pictures", type=int, default=64)
  args = parser.parse_args()
  run(args.model, args.clients, args.requests, args.batch, args.pictures)


if __name__ == "__main__":
  main()
