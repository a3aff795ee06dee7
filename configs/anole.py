"""Anole-7B. Variants: native (the default), hf.

    python -m infer.convert --config configs/anole.py \
        --source hf:GAIR/Anole-7b-v0.1 --out models/anole
"""

from ssd_jax.families.anole import get_config

__all__ = ["get_config"]
