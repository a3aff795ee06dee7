"""Emu3-Gen 8B. The variant is a ratio, such as 16:9; the default is 1:1.

    python -m infer.convert --config configs/emu3.py \
        --source hf:BAAI/Emu3-Gen --vq hf:BAAI/Emu3-VisionTokenizer \
        --out models/emu3
    python -m train.mtp --config configs/emu3.py  # reads prompts.txt
"""

from ssd_jax.families.emu3 import get_config

__all__ = ["get_config"]
