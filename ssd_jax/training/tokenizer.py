"""Trains a VQ tokenizer with a moving-average codebook.

The codebook follows the encoder's outputs by exponential moving averages
(van den Oord et al. 2017, arXiv:1711.00937, appendix A.1). The first
`continuous_steps` train a plain autoencoder. Then the codebook's entries are
set to random encoder outputs, and entries that fall out of use are reset in the
same way, which keeps the whole codebook in use. Outputs are sampled in
proportion to the pixel error at their grid positions: sampled evenly, a third
of the entries would settle on blank background.

An entry has a price, `rate` times its negative log frequency, so that of two
entries that fit a grid position about equally well the more frequent one is
taken (entropy-constrained quantisation: Chou, Lookabaugh and Gray 1989).
Otherwise blank positions get tokens that no caption predicts but that identify
the image, and a trunk learns to read these tokens instead of the caption.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssd_jax.core.config import LoopConfig, OptimizerConfig, check
from ssd_jax.data import stream as data_stream
from ssd_jax.models.codebook_search import nearest_code
from ssd_jax.models.vq import VQ, VQConfig, to_float
from ssd_jax.storage import checkpoints
from ssd_jax.training import loop
from ssd_jax.training.state import TrainState, apply_gradients, make_optimizer


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Settings of tokenizer training.

  Attributes:
    optimizer: Optimizer of the encoder and decoder.
    loop: Steps, batch and logging.
    commitment: Weight of the commitment loss.
    l1: Weight of the mean absolute error, added to the mean squared error.
    decay: Decay of the codebook's moving averages.
    restart_below: Average count per step below which a codebook entry is set
      to a random encoder output.
    rate: Price of a codebook entry per nat of its negative log frequency, in
      units of squared distance; needs a tokenizer with prices.
    continuous_steps: Steps before quantisation starts.
    max_shift: Most pixels by which an image is shifted at random.
    start_from: Folder of a tokenizer to start from; "" starts from random
      weights. A codebook of another size is not reused; `continuous_steps`
      must then be 1 or more, so that a new one is set.
  """

  optimizer: OptimizerConfig = OptimizerConfig()
  loop: LoopConfig = LoopConfig()
  commitment: float = 0.25
  l1: float = 0.25
  decay: float = 0.98
  restart_below: float = 0.03
  rate: float = 0.0
  continuous_steps: int = 200
  max_shift: int = 6
  start_from: str = ""

  def __post_init__(self):
    for name in ("commitment", "l1", "rate", "continuous_steps", "max_shift"):
      value = getattr(self, name)
      check(value >= 0, name, value, "0 or more")
    check(self.restart_below > 0, "restart_below", self.restart_below, "> 0")
    check(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
    check(self.loop.accumulate == 1, "accumulate", self.loop.accumulate,
          "1, because the codebook follows whole batches")


@flax.struct.dataclass
class CodebookStats:
  """Moving averages behind the codebook.

  Attributes:
    count: float32 [V], latents per step quantised to each entry.
    total: float32 [V, Z], sum of these latents.
  """

  count: jax.Array
  total: jax.Array


def load_augmented(
    source, index: int, rng: np.random.Generator,
    max_shift: int,
) -> dict[str, np.ndarray]:
  """Returns a random variant of an image, mirrored and shifted at random."""
  image = source.variant(index, rng)["image"]
  if rng.random() < 0.5:
    image = image[:, ::-1]
  dy, dx = rng.integers(-max_shift, max_shift + 1, 2)
  pad = ((max_shift, max_shift), (max_shift, max_shift), (0, 0))
  height, width, _ = image.shape
  image = np.pad(image, pad, mode="edge")
  top, left = max_shift - dy, max_shift - dx
  return {"image": image[top:top + height, left:left + width]}


def make_step(vq: VQ, cfg: TokenizerConfig, optimizer):
  """Returns the jitted training step."""

  def loss_fn(params, image, continuous):
    z = vq.apply({"params": params}, image, method="encode")
    codes = vq.apply({"params": params}, method="codes")
    price = params["price"] if vq.cfg.priced else 0.0
    ids = nearest_code(jax.lax.stop_gradient(z), codes, price)
    code = jax.lax.stop_gradient(codes[ids])
    commitment = jnp.mean((z - code) ** 2)
    straight = jnp.where(continuous, z, z + jax.lax.stop_gradient(code - z))
    y = vq.apply({"params": params}, straight, method="decode_latents")
    mse = jnp.mean((y - image) ** 2)
    loss = mse + cfg.l1 * jnp.mean(jnp.abs(y - image))
    # A plain autoencoder's latents would grow without bound.
    small, close = 1e-3 * jnp.mean(z**2), cfg.commitment * commitment
    loss += jnp.where(continuous, small, close)
    side = y.shape[1] // z.shape[1]
    error = jnp.mean((y - image) ** 2, axis=-1).reshape(
        len(y), z.shape[1], side, z.shape[2], side).mean((2, 4))
    return loss, (z, ids, error, commitment)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: TrainState, batch):
    image = to_float(batch["image"])
    continuous = state.step < cfg.continuous_steps
    grads, (z, ids, error, commitment) = jax.grad(loss_fn, has_aux=True)(
        state.params, image, continuous
    )
    key = jax.random.fold_in(jax.random.key(cfg.loop.seed + 1), state.step)
    starts = state.step == cfg.continuous_steps - 1
    state = apply_gradients(state, grads, optimizer, cfg.optimizer)
    codes, stats = update_codebook(
        state.params["codebook"], state.extra, (z, ids, error), key, starts, cfg
    )
    book = {"codebook": codes}
    if vq.cfg.priced:
      share = stats.count / jnp.sum(stats.count)
      book["price"] = -cfg.rate * jnp.log(share)
    params = {**state.params, **book}
    ema = state.ema and {**state.ema, **book}
    metrics = {
        "psnr": 10 * jnp.log10(4.0 / jnp.mean(error)),
        "commitment": commitment,
        "codes_per_batch": jnp.sum(
            jnp.bincount(ids.ravel(), length=len(codes)) > 0),
    }
    return state.replace(params=params, ema=ema, extra=stats), metrics

  return step


def update_codebook(codes_VZ, stats: CodebookStats, batch, key, starts, cfg):
  """Returns the codebook and its averages after one batch.

  Unused entries, or all entries where `starts`, are set to latents of the
  batch, sampled by the pixel error at their grid positions and jittered so that
  no two are equal.

  Args:
    codes_VZ: [V, Z], the codebook.
    stats: Moving averages of the codebook.
    batch: (latents [B, R, C, Z], ids [B, R, C], pixel errors [B, R, C]).
    key: Random key of the samples.
    starts: bool [], whether this is the first quantised step.
    cfg: Decay and threshold.
  """
  z, ids, error = batch
  z, vocab = z.reshape(-1, z.shape[-1]), len(codes_VZ)
  one_hot = jax.nn.one_hot(ids.ravel(), vocab, dtype=z.dtype)
  mix = lambda old, new: cfg.decay * old + (1 - cfg.decay) * new
  count = mix(stats.count, one_hot.sum(0))
  total = mix(stats.total, one_hot.T @ z)
  pick_key, jitter_key = jax.random.split(key)
  mass = jnp.cumsum(error.ravel())
  u = jax.random.uniform(pick_key, (vocab,))
  picks = jnp.searchsorted(mass, mass[-1] * u)
  fresh = z[jnp.minimum(picks, len(z) - 1)]
  jitter = jax.random.normal(jitter_key, fresh.shape)
  fresh += 0.01 * jnp.std(z, axis=0) * jitter
  restart = starts | (count < cfg.restart_below)
  count = jnp.where(restart, 10 * cfg.restart_below, count)
  total = jnp.where(restart[:, None], fresh * count[:, None], total)
  return total / count[:, None], CodebookStats(count, total)


def reconstruct(
    vq: VQ, params, images: np.ndarray, batch: int = 16
):
  """Encodes and decodes uint8 images [N, H, W, 3].

  Returns:
    (pixels [N, H, W, 3] in [-1, 1], token ids [N, R, C]).
  """

  @jax.jit
  def run(params, image):
    z = vq.apply({"params": params}, to_float(image), method="encode")
    ids = vq.apply({"params": params}, z, method="quantize")
    return vq.apply({"params": params}, ids, method="decode"), ids

  outs = []
  for start in range(0, len(images), batch):
    chunk = images[start:start + batch]
    pad = np.concatenate([chunk, np.repeat(chunk[-1:], batch - len(chunk), 0)])
    outs.append([np.asarray(x)[:len(chunk)] for x in run(params, pad)])
  pixels, ids = (np.concatenate(x) for x in zip(*outs, strict=True))
  return pixels, ids


def encode(
    vq: VQ, params, images: Iterable[np.ndarray], batch: int = 16
) -> Iterator[np.ndarray]:
  """Yields the token ids of uint8 images [H, W, 3] in parts, [n, R, C]."""

  @jax.jit
  def run(params, image):
    z = vq.apply({"params": params}, to_float(image), method="encode")
    return vq.apply({"params": params}, z, method="quantize")

  images = iter(images)
  while part := list(itertools.islice(images, batch)):
    pad = part[-1:] * (batch - len(part))
    yield np.asarray(run(params, np.stack(part + pad)))[:len(part)]


def psnr(pixels: np.ndarray, images: np.ndarray) -> np.ndarray:
  """Returns the PSNR in dB per image, with pixels rounded to uint8."""
  shown = np.clip(np.round((pixels + 1) * 127.5), 0, 255)
  mse = np.mean((shown - images.astype(np.float32)) ** 2, axis=(1, 2, 3))
  return 10 * np.log10(255.0**2 / np.maximum(mse, 1e-10))


def _start_from(cfg: TokenizerConfig, params):
  """Returns `params` with those of `cfg.start_from` that fit."""
  known = checkpoints.cast(checkpoints.restore(cfg.start_from), jnp.float32)
  if known["codebook"].shape != params["codebook"].shape:
    check(cfg.continuous_steps > 0, "continuous_steps", cfg.continuous_steps,
          "1 or more, because start_from has another codebook")
    del known["codebook"]
  return {**params, **{k: v for k, v in known.items() if k in params}}


def run(
    vq_cfg: VQConfig, cfg: TokenizerConfig, splits: dict, workdir: str
) -> TrainState:
  """Trains a tokenizer on `splits["train"]` into `workdir`.

  Evaluates on at most 256 images of `splits["validation"]`.
  """
  vq = VQ(vq_cfg)
  held_out = splits["validation"]
  held_out_images = np.stack([
      held_out[i]["image"] for i in range(min(len(held_out), 256))
  ])
  side = held_out_images.shape[1]
  params = jax.jit(vq.init)(
      jax.random.key(cfg.loop.seed), jnp.zeros((1, side, side, 3))
  )["params"]
  if cfg.start_from:
    params = _start_from(cfg, params)
  stats = CodebookStats(
      jnp.ones(vq_cfg.n_codes), jnp.copy(params["codebook"]))
  optimizer = make_optimizer(cfg.optimizer, cfg.loop)
  optimizer = optax.masked(
      optimizer, {k: k not in ("codebook", "price") for k in params}
  )
  state = TrainState.make(params, optimizer, cfg.optimizer, stats)
  data = data_stream.stream(
      splits["train"],
      functools.partial(load_augmented, max_shift=cfg.max_shift),
      cfg.loop.batch, cfg.loop.seed,
  )

  def evaluate(state):
    pixels, ids = reconstruct(vq, state.eval_params, held_out_images)
    return {
        "validation_psnr": float(psnr(pixels, held_out_images).mean()),
        "validation_codes": len(np.unique(ids)),
    }

  return loop.train(
      workdir, state, make_step(vq, cfg, optimizer), data, cfg.loop, evaluate
  )
