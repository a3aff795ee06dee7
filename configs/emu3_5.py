"""Emu3.5-Image 34B. The variant is a ratio, such as 16:9; the default is 4:3.

    python -m infer.convert --config configs/emu3_5.py \
        --source hf:BAAI/Emu3.5-Image --vq hf:BAAI/Emu3.5-VisionTokenizer \
        --out models/emu3_5
    python -m train.mtp --config configs/emu3_5.py  # reads prompts.txt
"""

from ssd_jax.families.emu3_5 import get_config

__all__ = ["get_config"]
