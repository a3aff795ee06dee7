"""What a server counts, for Prometheus.

Names follow those that vLLM's and SGLang's users know, after `ssd_jax_`: the
length of accepted drafts is rate(tokens_total) / rate(image_passes_total).
"""

from collections.abc import Callable
from typing import Any

from ssd_jax.core.extras import need

_SECONDS = (.1, .25, .5, 1, 2.5, 5, 10, 25, 50, 100, 300)


class Metrics:
  """Counters of one server; none is shared with others of the process."""

  def __init__(self) -> None:
    self._library: Any = need("prometheus_client", "serve")
    library = self._library
    self._registry = library.CollectorRegistry()
    counter = lambda name, text, labels=(): library.Counter(
        f"ssd_jax_{name}", text, labels, registry=self._registry)
    histogram = lambda name, text, labels=(), buckets=_SECONDS: (
        library.Histogram(f"ssd_jax_{name}", text, labels, buckets=buckets,
                          registry=self._registry))
    self.images = counter("images", "Images that are complete.", ["decoder"])
    self.tokens = counter(
        "tokens", "Image tokens of complete images.", ["decoder"])
    self.image_passes = counter(
        "image_passes", "Forward passes of complete images, each its own.",
        ["decoder"])
    self.passes = counter(
        "passes", "Forward passes, each of a whole batch.", ["decoder"])
    self.pass_seconds = counter(
        "pass_seconds", "Seconds of these passes.", ["decoder"])
    self.slot_passes = counter(
        "slot_passes", "Slots of these passes, with and without an image.",
        ["decoder", "state"])
    self.compile_seconds = counter(
        "compile_seconds", "Seconds in which decoders were made ready.")
    self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
    self.requests = counter(
        "requests", "Requests by how they ended.", ["finished_reason"])
    self.refused = counter(
        "requests_refused", "Requests that were not accepted.", ["status"])
    self.queue_seconds = histogram(
        "request_queue_seconds", "Seconds until an image got a slot.")
    self.first_partial_seconds = histogram(
        "time_to_first_partial_seconds",
        "Seconds from a request to its first image, finished or not.")
    self.request_seconds = histogram(
        "request_seconds", "Seconds from a request to its end.",
        ["finished_reason"])

  def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
    """Adds a value that is read when somebody asks for it."""
    self._library.Gauge(
        f"ssd_jax_{name}", text, registry=self._registry).set_function(read)

  def text(self) -> tuple[bytes, str]:
    """Returns all values in Prometheus' text format, and its media type."""
    return (self._library.generate_latest(self._registry),
            self._library.CONTENT_TYPE_LATEST)
