"""Lumina-mGPT-7B. Variants: 512, 768 (the default), 1024.

    python -m infer.convert --config configs/lumina.py:768 \
        --source hf:Alpha-VLLM/Lumina-mGPT-7B-768 --vq CHAMELEON_DIR \
        --out models/lumina_768
    python -m train.mtp --config configs/lumina.py  # reads prompts.txt

Only the 768 repository holds a tokenizer: for the others add --tokenizer. The
image tokenizer, vqgan.ckpt, is Meta's, in its Chameleon download.
"""

from ssd_jax.families.lumina import get_config

__all__ = ["get_config"]
