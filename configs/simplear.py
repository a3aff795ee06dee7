"""SimpleAR. Variants: 0.5b (the default), 1.5b.

    python -m infer.convert --config configs/simplear.py:0.5b \
        --source hf:Daniel0724/SimpleAR-0.5B-RL \
        --vq hf:nvidia/Cosmos-1.0-Tokenizer-DV8x16x16 \
        --out models/simplear_0.5b
    python -m train.mtp --config configs/simplear.py  # reads prompts.txt

If the repository holds no tokenizer.json, add
--tokenizer hf:Qwen/Qwen2.5-0.5B-Instruct.
"""

from ssd_jax.families.simplear import get_config

__all__ = ["get_config"]
