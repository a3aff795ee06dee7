"""infer.serve with a model of milliseconds, as one of several hosts.

    python -m tests.support.tiny_server --port 8000 [--hosts' flags]
"""

from unittest import mock

from ssd_jax.cli import common, serve
from ssd_jax.pipeline import testing

SIZES = dict(vocab=5, rows=4, cols=4, guidance=2.0)

if __name__ == "__main__":
  with mock.patch.object(
      common, "load_pipeline", lambda **_: testing.tiny(**SIZES)):
    serve.main()
