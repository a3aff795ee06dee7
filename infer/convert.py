"""Published PyTorch checkpoint -> model folder: `python -m infer.convert`."""

from ssd_jax.cli.convert import main

if __name__ == "__main__":
  main()
