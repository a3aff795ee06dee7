"""Toy checkpoints: weights that a tensor's published name determines."""

import dataclasses
import json
import math
import zlib

import ml_dtypes
import numpy as np

CODES = 32
DIM, LAYERS, HEADS, HIDDEN = 64, 2, 4, 96
_NAMES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16",
          np.dtype(np.int8): "I8"}


def toy(name, shape):
  """float32 numbers under which no part of a network is trivial."""
  x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
  if name.endswith("running_var"):
    x = 0.5 + np.abs(x)
  elif "norm" in name and not name.endswith("bias") and (
      len(shape) == 1 or "_norm." in name):
    x = 0.2 * x + (0.0 if name.endswith("running_mean") else 1.0)
  elif len(shape) == 1 or name.endswith("bias"):
    x = 0.2 * x
  else:
    x *= 1.5 / math.sqrt(math.prod(shape[1:]))
  return x.astype(np.float32)


@dataclasses.dataclass
class InMemory:
  """A published tensor that is in no file."""

  name: str
  shape: tuple[int, ...]

  def read(self, start=0, stop=None):
    return toy(self.name, self.shape)[start:stop]


def write_safetensors(file, arrays):
  """A safetensors file of the arrays."""
  header, offset = {}, 0
  for name, x in arrays.items():
    header[name] = {"dtype": _NAMES[x.dtype], "shape": x.shape,
                    "data_offsets": [offset, offset + x.nbytes]}
    offset += x.nbytes
  text = json.dumps(header).encode()
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(
      np.ascontiguousarray(x).tobytes() for x in arrays.values()))


def shrink_trunk(config, vocab_in, kv=HEADS):
  """Toy sizes of a trunk."""
  config.trunk.update(
      d_model=DIM, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=kv,
      head_dim=DIM // HEADS, d_ff=HIDDEN, vocab_in=vocab_in, vocab_out=CODES)
  if "head_hidden" in config.trunk:
    config.trunk.head_hidden = 48


def shrink_vq(config, levels=2, dim=8, z=16):
  """Toy sizes of an image tokenizer."""
  config.vq.update(
      ch=32, ch_mult=(1,) * (levels - 1) + (2,), num_res_blocks=1,
      z_channels=z, n_codes=CODES, code_dim=dim,
      attn_levels=(levels - 1,) if config.vq.attn_levels else ())
