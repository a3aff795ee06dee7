"""python -m infer.generate --prompt "red heart" --prompt "smiling cat face" """

from ssd_jax.cli import generate

if __name__ == "__main__":
  generate.main()
