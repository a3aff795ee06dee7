"""python -m infer.compare --size 100m --out compare"""

from ssd_jax.cli import compare

if __name__ == "__main__":
  compare.main()
