"""GLM-Image, its autoregressive stage.

    python -m infer.convert --config configs/glm_image.py \
        --source hf:zai-org/GLM-Image --out models/glm_image
    python -m infer.generate --config configs/glm_image.py \
        --config.size=1152x896 --checkpoint models/glm_image --prompt "a fox"
"""

from ssd_jax.families.glm_image import get_config

__all__ = ["get_config"]
