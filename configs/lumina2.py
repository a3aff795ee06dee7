"""Lumina-mGPT 2.0, 7B. Sizes are multiples of 32 px; it was trained on 768x768.

    python -m infer.convert --config configs/lumina2.py \
        --source hf:Alpha-VLLM/Lumina-mGPT-2.0 --vq hf:ai-forever/MoVQGAN \
        --out models/lumina2
    python -m train.mtp --config configs/lumina2.py  # reads prompts.txt
"""

from ssd_jax.families.lumina2 import get_config

__all__ = ["get_config"]
