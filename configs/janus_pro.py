"""Janus-Pro. Variants: 1b (the default), 7b.

    python -m infer.convert --config configs/janus_pro.py:1b \
        --source hf:deepseek-ai/Janus-Pro-1B --out models/janus_pro_1b
    python -m train.mtp --config configs/janus_pro.py  # reads prompts.txt
"""

from ssd_jax.families.janus import get_config

__all__ = ["get_config"]
