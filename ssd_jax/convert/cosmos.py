"""Cosmos' discrete video tokenizer, reduced to single images.

Its layers are separate for space and time, and its time is padded by repeating
the first frame. For one frame, a temporal convolution is therefore a 1x1
convolution with the sum of its taps, which most of the time is merged with the
spatial one before it; attention over frames is its value projection. Residual
and average-pooling branches of the resampling layers are linear, and so are the
Haar wavelets between pixels and channels: they are merged too.

An affine map is (kernel [O, I, h, w], bias [O]).
"""

from collections.abc import Callable, Iterable
import re

import numpy as np

from ssd_jax.convert.recipes import Row, Source, conv, vq_shapes
from ssd_jax.models.vq import VQConfig

FILES = ("**/[de][en]coder.jit",)  # encoder.jit and decoder.jit
_PATCH, _COLOURS = 4, 3
_BANDS = 64  # of two steps of 2 x 2 x 2 wavelets
Affine = tuple[np.ndarray, np.ndarray]
Shape = tuple[int, ...]
_Names = tuple[tuple[str, Shape], ...]  # of convolutions: name, weight's shape


def ignored(cfg: VQConfig) -> tuple[str, ...]:
  """Returns patterns of the tensors that a single image does not use."""
  levels = range(1, len(cfg.ch_mult))
  unused = [i for i in levels if i not in cfg.frame_levels]
  return (
      r"(inv_quant\.)?quantizer\..*", r"(en|de)coder\.(un)?patcher.*",
      r"(en|de)coder\.mid\.attn_1\.1\.[qk]\..*",
      *(rf"decoder\.up\.{i}\.upsample\.conv1\..*" for i in unused),
      *(rf"encoder\.down\.{i - 1}\.downsample\.conv2\..*" for i in unused))


def rows(cfg: VQConfig) -> list[Row]:
  """Returns the rows of the whole tokenizer."""
  found: list[Row] = []
  modules = {path.rpartition("/")[0]: leaf.shape
             for path, leaf in vq_shapes(cfg).items()
             if path.endswith("/kernel")}
  for path, leaf in vq_shapes(cfg).items():
    module, _, kind = path.rpartition("/")
    if kind == "scale" or module not in modules:  # a group norm
      name = _published(module) + ".norm"
      name += ".weight" if kind == "scale" else ".bias"
      found.append(Row(path, (Source(name, leaf.shape),)))
  for module, (height, _, fan_in, fan_out) in modules.items():
    found += _conv_rows(cfg, module, height, fan_in, fan_out)
  return found


def _conv_rows(
    cfg: VQConfig, module: str, height: int, fan_in: int, fan_out: int
) -> Iterable[Row]:
  """Yields the rows of a convolution's kernel and bias."""
  names, merge = _merged(cfg, module, height, fan_in, fan_out)
  sources = tuple(
      source for name, shape in names for source in (
          Source(f"{name}.conv3d.weight", shape),
          Source(f"{name}.conv3d.bias", shape[:1])))

  def merged(*arrays: np.ndarray) -> Affine:
    pairs = [x.astype(np.float32) for x in arrays]
    return merge(*zip(pairs[::2], pairs[1::2], strict=True))

  yield Row(f"{module}/kernel", sources, lambda *x: conv(merged(*x)[0]))
  yield Row(f"{module}/bias", sources, lambda *x: merged(*x)[1])


def _merged(
    cfg: VQConfig, module: str, height: int, fan_in: int, fan_out: int
) -> tuple[_Names, Callable[..., Affine]]:
  """Returns the published convolutions of one of ours, and how they merge."""
  name = _published(module)
  space = lambda out, into: (out, into, 1, height, height)
  time, mix = (fan_out, fan_out, 3, 1, 1), (fan_out, fan_out, 1, 1, 1)
  if module.endswith("frames"):
    return ((name, time),), _over_time
  if module.endswith("frame_attn_1/value"):
    return ((f"{name}.v", mix), (f"{name}.proj_out", mix)), _in_space
  if module.endswith("upsample"):
    return ((f"{name}.conv2", space(fan_out, fan_in)),
            (f"{name}.conv3", mix)), _upsampling
  if module.endswith("downsample"):
    level = int(re.sub(r".*down_(\d).*", r"\1", module))
    with_time = ((f"{name}.conv2", time),) * (level + 1 in cfg.frame_levels)
    return ((f"{name}.conv1", space(fan_out, fan_in)), *with_time,
            (f"{name}.conv3", mix)), _downsampling
  if height == 1:
    return ((name, space(fan_out, fan_in)),), _in_space
  bands = _BANDS * _COLOURS
  if module.endswith("encoder/conv_in"):
    return ((f"{name}.0", space(fan_out, bands)),
            (f"{name}.1", time)), _from_pixels
  if module.endswith("decoder/conv_out"):
    return ((f"{name}.0", space(bands, fan_in)),
            (f"{name}.1", (bands, bands, 3, 1, 1))), _to_pixels
  return ((f"{name}.0", space(fan_out, fan_in)),
          (f"{name}.1", time)), _space_then_time


def _published(module: str) -> str:
  """Returns the published name of a module such as "vq/decoder/mid/attn_1"."""
  name = module.removeprefix("vq/").replace("/", ".")
  name = re.sub(r"(up|down)_(\d)_block_(\d)", r"\1.\2.block.\3", name)
  name = re.sub(r"(up|down)_(\d)_((?:up|down)sample)", r"\1.\2.\3", name)
  name = re.sub(r"up_(\d)_frames", r"up.\1.upsample.conv1", name)
  name = name.replace("mid.attn_1", "mid.attn_1.0")
  name = name.replace("mid.frame_attn_1", "mid.attn_1.1")
  return name.removesuffix(".value")


def _in_space(*maps: Affine) -> Affine:
  """Composes convolutions of kernels (1, h, w), all but the first one 1x1."""
  (kernel, bias), *others = maps
  composed = kernel[:, :, 0], bias
  for kernel, bias in others:
    composed = _then(composed, kernel[:, :, 0, 0, 0], bias)
  return composed


def _over_time(convolution: Affine) -> Affine:
  kernel, bias = convolution
  return kernel.sum(2), bias


def _space_then_time(space: Affine, time: Affine) -> Affine:
  kernel, bias = _over_time(time)
  return _then(_in_space(space), kernel[:, :, 0, 0], bias)


def _upsampling(space: Affine, mix: Affine) -> Affine:
  """mix(space(x) + x), of an x that is already larger."""
  kernel, bias = _in_space(space)
  centre = kernel.shape[2] // 2
  kernel = kernel.copy()
  kernel[:, :, centre, centre] += np.eye(len(kernel), dtype=np.float32)
  return _then((kernel, bias), mix[0][:, :, 0, 0, 0], mix[1])


def _downsampling(space: Affine, *others: Affine) -> Affine:
  """mix(y + time(y)), y = space(x) + mean of 2 x 2 x; `time` may be absent."""
  *with_time, mix = others
  kernel, bias = _in_space(space)
  kernel = kernel.copy()
  kernel[:, :, :2, :2] += np.eye(
      len(kernel), dtype=np.float32)[:, :, None, None] / 4
  composed = kernel, bias
  for time in with_time:
    taps, offset = _over_time(time)
    residual = taps[:, :, 0, 0] + np.eye(len(taps), dtype=np.float32)
    composed = _then(composed, residual, offset)
  return _then(composed, mix[0][:, :, 0, 0, 0], mix[1])


def _from_pixels(space: Affine, time: Affine) -> Affine:
  kernel, bias = _space_then_time(space, time)
  return np.einsum("oihw,ip->ophw", kernel, _haar()[0]), bias


def _to_pixels(space: Affine, time: Affine) -> Affine:
  zeros = np.zeros(_PATCH**2 * _COLOURS, np.float32)
  return _then(_space_then_time(space, time), _haar()[1], zeros)


def _then(affine: Affine, matrix: np.ndarray, offset: np.ndarray) -> Affine:
  """Composes an affine map with y -> matrix y + offset."""
  kernel, bias = affine
  return np.einsum("po,oihw->pihw", matrix, kernel), matrix @ bias + offset


def _haar() -> tuple[np.ndarray, np.ndarray]:
  """Returns the wavelets as matrices between 4 x 4 pixels and 192 channels.

  Both steps' bands are numbered by time, height and width, low before high; the
  second step's is the slower index. Four equal frames have nothing in bands of
  high time; of four decoded frames the last one is kept, where a high band of
  time counts negatively.

  Returns:
    (float32 [192, 48] from pixels to channels, float32 [48, 192] back).
  """
  band, y, x = np.ogrid[:8, :2, :2]
  step = (1 - 2 * ((band >> 1) & y & 1)) * (1 - 2 * (band & x & 1))
  signs = np.einsum("bYX,ayx->baYyXx", step, step).reshape(_BANDS, _PATCH**2)
  is_low = np.arange(8) < 4
  is_still = np.outer(is_low, is_low).ravel()
  last = np.outer(2 * is_low - 1, 2 * is_low - 1).ravel()
  colours = np.eye(_COLOURS)
  analysis = np.kron(signs * is_still[:, None] / _PATCH**2, colours)
  synthesis = np.kron(signs * last[:, None], colours).T
  return analysis.astype(np.float32), synthesis.astype(np.float32)
