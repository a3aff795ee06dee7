"""Body of infer.demo: the live page, with every decoder.

It is infer.serve with other defaults.
"""

from ssd_jax.cli import run as cli, serve


def define_flags() -> None:
  """Defines the command's own flags."""
  serve.define_flags(7860, "stair,ar", any_decoder=True)


def body() -> None:
  """Serves the page until SIGTERM or Ctrl-C."""
  serve.body()


def main() -> None:
  """Console entry point."""
  cli.define_config()
  define_flags()
  cli.main(body, draws=True)
