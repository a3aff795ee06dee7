"""Published names of the image tokenizers' tensors, in three naming styles.

"raster" is the style of LlamaGen and Janus (decoder levels are numbered in the
order in which they run), "taming" that of Chameleon, "video" that of Emu3.
"""

import re

import numpy as np

from ssd_jax.convert.recipes import Row, Source, conv, copy, vq_shapes
from ssd_jax.models.vq import VQConfig

_SUFFIX = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_BATCH_NORM_EPS = 1e-5


def vq_rows(cfg: VQConfig, style: str, prefix: str = "") -> list[Row]:
  """Returns the rows of a whole tokenizer.

  Args:
    cfg: Config of the tokenizer.
    style: "raster", "taming" or "video".
    prefix: Prefix of all published names.
  """
  rows = []
  for path, leaf in vq_shapes(cfg).items():
    module, _, kind = path.removeprefix("vq/").rpartition("/")
    if kind == "codebook":
      name = f"{prefix}quantize.embedding.weight"
      rows.append(Row(path, (Source(name, leaf.shape),)))
      continue
    name = prefix + published_module(cfg, module, style)
    if style == "video" and _is_temporal(module):
      rows.append(_temporal_row(path, module, name, kind, leaf.shape))
      continue
    shape = leaf.shape
    if kind == "kernel":
      shape = (shape[3], shape[2], *shape[:2])
    source = Source(f"{name}.{_SUFFIX[kind]}", shape)
    rows.append(Row(path, (source,), conv if kind == "kernel" else copy))
  return rows


def published_module(cfg: VQConfig, module: str, style: str) -> str:
  """Returns the published name of a module such as "decoder/mid/attn_1"."""
  name = module.replace("/", ".")
  name = re.sub(r"time_(res|conv)_(\d)", lambda m: (
      f"time_res_stack.{m[2]}" if m[1] == "res" else f"time_conv.{m[2]}"), name)
  if style != "raster":
    name = re.sub(r"(up|down)_(\d)_(block|attn)_(\d)", r"\1.\2.\3.\4", name)
    return re.sub(r"(up|down)_(\d)_((?:up|down)sample)", r"\1.\2.\3.conv", name)
  name = re.sub(r"mid\.(block_1|attn_1|block_2)", lambda m: (
      f"mid.{('block_1', 'attn_1', 'block_2').index(m[1])}"), name)
  level = lambda m: (
      int(m[2]) if m[1] == "down" else len(cfg.ch_mult) - 1 - int(m[2]))
  part = {"block": "res", "attn": "attn"}
  name = re.sub(
      r"(up|down)_(\d)_(block|attn)_(\d)",
      lambda m: f"conv_blocks.{level(m)}.{part[m[3]]}.{m[4]}", name)
  return re.sub(
      r"(up|down)_(\d)_((?:up|down)sample)",
      lambda m: f"conv_blocks.{level(m)}.{m[3]}.conv", name)


def _is_temporal(module: str) -> bool:
  return "time_" in module or module in ("quant_conv", "post_quant_conv")


def _temporal_row(
    path: str, module: str, name: str, kind: str, shape: tuple[int, ...]
) -> Row:
  """Returns the row of a temporal layer, reduced to a single image."""
  if re.search(r"norm\d$", module):
    parts = ("weight", "bias", "running_mean", "running_var")
    sources = tuple(Source(f"{name}.{part}", shape) for part in parts)
    return Row(path, sources, _norm_scale if kind == "scale" else _norm_shift)
  halving = re.search(r"encoder/time_conv_(\d)", module)
  name += ".conv.conv" if "time_conv" in module else ".conv"
  if kind == "bias":
    copies = 2 if halving and halving[1] == "0" else 1
    source = Source(f"{name}.bias", (shape[0] // copies,))
    return Row(path, (source,), lambda x: np.tile(x, copies))
  height, width, fan_in, fan_out = shape
  if not halving:
    source = Source(f"{name}.weight", (fan_out, fan_in, 3, height, width))
    return Row(path, (source,), lambda x: conv(x[:, :, -1]))
  channels = min(fan_in, fan_out)
  source = Source(f"{name}.weight", (channels, channels, 4, height, width))
  return Row(path, (source,), _first_halving if halving[1] == "0"
             else _second_halving)


def _norm_scale(weight, bias, mean, var) -> np.ndarray:
  del bias, mean
  return weight / np.sqrt(var + _BATCH_NORM_EPS)


def _norm_shift(weight, bias, mean, var) -> np.ndarray:
  return bias - mean * _norm_scale(weight, bias, mean, var)


def _first_halving(x: np.ndarray) -> np.ndarray:
  """Converts the first temporal halving, of four equal frames to two frames.

  The input is padded by two frames of zeros, so the first output frame uses the
  last two temporal taps, the second all four. Both frames are concatenated as
  channels.
  """
  seen = x[:, :, 2:].sum(2), x.sum(2)
  return np.concatenate([conv(taps) for taps in seen], axis=-1)


def _second_halving(x: np.ndarray) -> np.ndarray:
  """Converts the second temporal halving, of two frames to one.

  The input is padded by two frames of zeros, so only the last two temporal taps
  are used.
  """
  return np.concatenate([conv(x[:, :, 2]), conv(x[:, :, 3])], axis=2)
