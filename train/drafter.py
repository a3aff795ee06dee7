"""python -m train.drafter --config configs/emoji.py --workdir DIR"""

from ssd_jax.cli import train

if __name__ == "__main__":
  train.main_drafter()
