"""LlamaGen. Variants: c2i_{B,L,XL,XXL,3B}_{256,384}, t2i_XL_{256,512}.

For c2i, the suffix `_ds8` selects the tokenizer with 8 px per token.

    python -m infer.convert --config configs/llamagen.py:c2i_XL_384 \
        --source hf:FoundationVision/LlamaGen --out models/llamagen_c2i_XL_384
    python -m infer.convert --config configs/llamagen.py:t2i_XL_256 \
        --source hf:peizesun/llamagen_t2i --text_encoder hf:google/flan-t5-xl \
        --tokenizer hf:google/flan-t5-xl --out models/llamagen_t2i_XL_256

Prompts are class numbers (c2i) or captions (t2i).
"""

from ssd_jax.families.llamagen import get_config

__all__ = ["get_config"]
