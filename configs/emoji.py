"""The embedded model: 128 px Fluent emoji on a 16x16 grid.

    python -m train.tokenizer --config configs/emoji.py --workdir runs/emoji
    python -m train.ar --config configs/emoji.py --workdir runs/emoji
    python -m infer.generate --checkpoint runs/emoji/model --prompt "red heart"

`configs/emoji.py:smoke` is the same at the size of a test. The settings are in
the package, so that they are at hand where it is installed without this folder.
"""

from ssd_jax.families.emoji import get_config

__all__ = ["get_config"]
