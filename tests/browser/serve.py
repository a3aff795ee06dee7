"""The page on a free port of this process, for the checks beside this file."""

import contextlib

import ssd_jax
from ssd_jax.serving.app import read_bench
from tests.support import chains, served

DECODERS = ("stair", "ar")


@contextlib.contextmanager
def page(model: str, bench: str | None = None):
  """(address, scheduler) of a page with "greys", "emoji" or a model folder."""
  pipe = chains.pipeline(8, 8, 32) if model == "greys" else ssd_jax.load(model)
  with served.site(pipe, DECODERS, any_decoder=True,
                   bench=read_bench(bench)) as found:
    yield found
