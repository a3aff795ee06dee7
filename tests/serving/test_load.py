"""A small load on every run of the whole suite; see tests/serving/load.py."""

import pytest

from tests.serving import load


@pytest.mark.slow
def test_nothing_is_lost_or_swapped():
  """Misbehaving clients, mixed settings, a server that is killed: each image is
  that of `generate`."""
  decoders, others = ("zipar:window=2",), dict(temperature=0.8, top_p=0.9)
  server = load.start("greys", decoders, 4)
  try:
    load.mixed(
        server, load.pipeline("greys"), decoders, 12, 10, others)
    load.killed(server)
  finally:
    server.process.kill()
