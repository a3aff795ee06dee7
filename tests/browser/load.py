"""200 requests of 16 visitors at once: none may be lost, the page stays quick.

    python -m tests.browser.load [--model emoji]
"""

import argparse
import collections
import concurrent.futures
import json
import time
import urllib.request

from tests.browser import serve


def ask(url, values=None):
  """The JSON of an answer."""
  body = None if values is None else json.dumps(values).encode()
  request = urllib.request.Request(
      url, body, {"Content-Type": "application/json"})
  with urllib.request.urlopen(request, timeout=30) as answer:
    return json.loads(answer.read())


def visit(address, number, decoder, end):
  """(seconds, final state, mean seconds of a look at the page)."""
  start, looks = time.monotonic(), []
  job = ask(f"{address}/api/jobs", dict(
      prompt=f"picture {number}", decoder=decoder, seed=number, race=False))
  while job["state"] in ("queued", "drawing") and time.monotonic() < end:
    time.sleep(0.25)
    look = time.monotonic()
    job = ask(f"{address}/api/jobs/{job['id']}")
    looks.append(time.monotonic() - look)
  return time.monotonic() - start, job["state"], sum(looks) / max(len(looks), 1)


def main():
  """Runs the load and says what came of it."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", default="greys")
  parser.add_argument("--requests", type=int, default=200)
  parser.add_argument("--clients", type=int, default=16)
  parser.add_argument("--decoders", default="ar,sjd:window=8,stair")
  parser.add_argument("--seconds", type=float, default=300)
  args = parser.parse_args()
  decoders = args.decoders.split(",")
  with serve.page(args.model) as (address, studio):
    end = time.monotonic() + args.seconds
    with concurrent.futures.ThreadPoolExecutor(args.clients) as clients:
      visits = list(clients.map(
          lambda number: visit(
              address, number, decoders[number % len(decoders)], end),
          range(args.requests)))
    drawn = studio.drawn
  seconds, states, looks = zip(*visits, strict=True)
  print(f"{args.requests} requests of {args.clients} clients: "
        f"{dict(collections.Counter(states))}, {drawn} images generated, "
        f"median {sorted(seconds)[len(seconds) // 2]:.2f} s, "
        f"longest {max(seconds):.2f} s, a look at the page takes "
        f"{1000 * sum(looks) / len(looks):.0f} ms")
  assert set(states) == {"done"} and drawn == args.requests


if __name__ == "__main__":
  main()
