"""Liquid-7B.

    python -m infer.convert --config configs/liquid.py \
        --source hf:Junfeng5/Liquid_V1_7B --vq CHAMELEON_DIR \
        --out models/liquid
    python -m train.mtp --config configs/liquid.py  # reads prompts.txt

The image tokenizer, vqgan.ckpt, is Meta's, in its Chameleon download.
"""

from ssd_jax.families.liquid import get_config

__all__ = ["get_config"]
