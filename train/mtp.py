"""python -m train.mtp --config configs/emoji.py --workdir DIR"""

from ssd_jax.cli import train

if __name__ == "__main__":
  train.main_mtp()
