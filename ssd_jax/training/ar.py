"""Trains a trunk on captions and image tokens with cross-entropy."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssd_jax.core.config import LoopConfig, OptimizerConfig, check
from ssd_jax.core.types import Prompt
from ssd_jax.data import stream as data_stream
from ssd_jax.data.survey import Survey
from ssd_jax.models.generator import Generator
from ssd_jax.models.vocabulary import Vocabulary, words_of
from ssd_jax.models.vq import VQ
from ssd_jax.runtime import sharding
from ssd_jax.runtime.progress import Bar
from ssd_jax.storage import checkpoints
from ssd_jax.storage.files import replacing
from ssd_jax.training import loop
from ssd_jax.training.state import (
  TrainState,
  apply_gradients,
  make_optimizer,
  mean_gradients,
)
from ssd_jax.training.tokenizer import encode


@dataclasses.dataclass(frozen=True)
class ARConfig:
  """Settings of trunk training.

  Attributes:
    optimizer: Optimizer of the trunk.
    loop: Steps, batch and logging.
    drop_caption: Share of empty captions, for guidance.
    add_tags: Share of captions with some of the tags after the label.
    only_tags: Share of captions that consist of tags alone.
    spell: Share of words that are spelled in bytes.
    corrupt: Largest share of an image's input tokens that are replaced by
      another image's tokens at the same grid positions; the share is sampled
      anew for each image. Without corruption, a small model recognises a
      training image by its previous tokens instead of its caption, and goes
      astray as soon as a sample leaves that path.
    start_from: Folder of a trunk to start from; "" starts from random weights.
    compute: Type of activations, "float32" or "bfloat16"; weights and the
      optimizer state are always float32.
  """

  optimizer: OptimizerConfig = OptimizerConfig()
  loop: LoopConfig = LoopConfig()
  drop_caption: float = 0.1
  add_tags: float = 0.25
  only_tags: float = 0.1
  spell: float = 0.03
  corrupt: float = 0.8
  start_from: str = ""
  compute: str = "float32"

  def __post_init__(self):
    check(self.compute in ("float32", "bfloat16"), "compute", self.compute,
          "float32 or bfloat16")
    for name in ("drop_caption", "add_tags", "only_tags", "spell", "corrupt"):
      value = getattr(self, name)
      check(0 <= value < 1, name, value, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class TokenSource:
  """All images of a split as tokens, grouped into items.

  Attributes:
    tokens: Unsigned [images, N], tokens of each image.
    captions: Label of each image.
    tags: Tags of each image.
    items: Indices of each item's images; the first is the plain variant.
  """

  tokens: np.ndarray
  captions: tuple[str, ...]
  tags: tuple[tuple[str, ...], ...]
  items: tuple[tuple[int, ...], ...]

  def __len__(self) -> int:
    return len(self.items)

  def sequences(self, images: Sequence[int]) -> np.ndarray:
    """Returns the tokens of some images, int32 [B, N]."""
    return self.tokens[np.asarray(images)].astype(np.int32)


def encode_split(
    vq: VQ, params, contents: Survey, cache: pathlib.Path
) -> TokenSource:
  """Returns the tokens of a source's images, cached for the next run.

  Images are read again, a few at a time; their tokens alone are kept. The cache
  lies beside `cache`. Its file name holds a checksum of the images and the
  tokenizer, so that other images or another tokenizer are encoded anew. Images
  of a damaged file are encoded again.
  """
  checksum = hashlib.sha256(contents.images.tobytes())
  for leaf in jax.tree.leaves(params):
    checksum.update(np.asarray(leaf).tobytes())
  name = f"{cache.stem}-{checksum.hexdigest()[:16]}"
  cache, count = cache.with_name(f"{name}.npz"), len(contents.captions)
  tokens = _read_tokens(cache, count)
  if tokens is None:
    tokens = _encode(vq, params, contents)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cache) as partial, open(partial, "wb") as file:
      np.savez(file, tokens=tokens, name=name)
  return TokenSource(tokens, contents.captions, contents.tags, contents.items)


def _encode(vq: VQ, params, contents: Survey) -> np.ndarray:
  """Returns tokens [images, N] in the smallest unsigned type that fits."""
  variants = data_stream.in_order(
      contents.source, lambda source, index: source.variants(index))
  images = (picture["image"] for pictures in variants for picture in pictures)
  parts, kind = [], np.min_scalar_type(vq.cfg.n_codes - 1)
  with Bar(total=len(contents.captions), desc="images to tokens", unit="image",
           disable=jax.process_index() > 0) as bar:
    for ids in encode(vq, params, images):
      parts.append(ids.reshape(len(ids), -1).astype(kind))
      bar.update(len(ids))
  return np.concatenate(parts)


def _read_tokens(cache: pathlib.Path, count: int) -> np.ndarray | None:
  """Returns `count` images' cached tokens; None if missing or damaged."""
  if not cache.exists():
    return None
  try:
    with np.load(cache) as file:
      # zip verifies its own checksums
      tokens, known = file["tokens"], str(file["name"])
    if known != cache.stem or tokens.ndim != 2 or len(tokens) != count:
      raise ValueError("of other images")
    return tokens
  except Exception as error:  # zip and numpy raise many types
    print(f"{cache} is damaged ({type(error).__name__}): encoding it again",
          file=sys.stderr)
    return None


def load_example(
    source: TokenSource, index: int, rng: np.random.Generator,
    words: Vocabulary, cfg: ARConfig,
) -> dict[str, np.ndarray]:
  """Returns an image's tokens with a random caption of its label and tags."""
  pictures = source.items[index]
  plain = len(pictures) == 1 or rng.random() < 0.5
  picture = pictures[0] if plain else pictures[rng.integers(len(pictures))]
  label, tags = source.captions[picture], source.tags[picture]
  text = random_caption(label, tags, rng, cfg)
  ids = []
  for word in words_of(text):
    ids += words.spell(word) if rng.random() < cfg.spell else words.ids(word)
  prompt, mask = words.pad(ids[: words.length - 2])
  tokens, other = source.sequences(
      [picture, int(rng.integers(len(source.tokens)))])
  is_other = rng.random(tokens.shape) < cfg.corrupt * rng.random()
  return {"tokens": tokens, "inputs": np.where(is_other, other, tokens),
          "prompt": prompt, "mask": mask}


def random_caption(
    label: str, tags: tuple[str, ...], rng: np.random.Generator, cfg: ARConfig
) -> str:
  """Returns the label, the label with tags, tags alone, or an empty text."""
  u = rng.random()
  if u < cfg.drop_caption:
    return ""
  some = [t for t in rng.permutation(list(tags)) if rng.random() < 0.5]
  if u < cfg.drop_caption + cfg.only_tags and some:
    return " ".join(some)
  if u < cfg.drop_caption + cfg.only_tags + cfg.add_tags:
    return " ".join([label, *some])
  return label


def cross_entropy(generator: Generator, params, batch) -> jax.Array:
  """Returns the NLL of every token given the inputs, float32 [B, N]."""
  rows, slots = batch["prompt"].shape
  positions = jnp.arange(slots + generator.grid.length)
  prompt = Prompt(
      batch["prompt"], batch["mask"],
      jnp.broadcast_to(positions, (rows, len(positions))),
  )
  hidden = generator.hidden(params, prompt, batch["inputs"])
  return optax.softmax_cross_entropy_with_integer_labels(
      generator.logits(params, hidden), batch["tokens"]
  )


def run(
    generator: Generator, words: Vocabulary, splits: dict[str, TokenSource],
    cfg: ARConfig, workdir: str,
) -> TrainState:
  """Trains a trunk on `splits["train"]` into `workdir`."""
  optimizer = make_optimizer(cfg.optimizer, cfg.loop)
  generator = dataclasses.replace(generator, dtype=jnp.dtype(cfg.compute))
  make = lambda params: TrainState.make(params, optimizer, cfg.optimizer)
  if cfg.start_from:
    known = {"trunk": checkpoints.restore(cfg.start_from)}
    state = make(checkpoints.cast(known, jnp.float32))
  else:
    state = sharding.create(
        lambda key: make(generator.init(key)), jax.random.key(cfg.loop.seed))
  load = functools.partial(load_example, words=words, cfg=cfg)
  data = data_stream.stream(
    splits["train"], load, cfg.loop.batch, cfg.loop.seed
  )

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: TrainState, batch):
    mean_loss = lambda params, part: jnp.mean(
        cross_entropy(generator, params, part))
    loss, grads = mean_gradients(
        functools.partial(jax.value_and_grad(mean_loss), state.params), batch,
        cfg.loop.accumulate)
    state = apply_gradients(state, grads, optimizer, cfg.optimizer)
    return state, {"loss": loss, "gradient": optax.global_norm(grads)}

  mean_loss = jax.jit(
      lambda params, batch: jnp.mean(cross_entropy(generator, params, batch)))

  def evaluate(state):
    figures = {}
    for name, source in splits.items():
      batches = plain_batches(source, words, cfg.loop.batch, count=128)
      figures[f"{name}_nll"] = float(np.mean(
          [mean_loss(state.eval_params, batch) for batch in batches]
      ))
    return figures

  return loop.train(workdir, state, step, data, cfg.loop, evaluate)


def plain_batches(
    source: TokenSource, words: Vocabulary, batch: int, count: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches of evenly spaced items with their labels as captions."""
  picks = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
  batch = min(batch, len(picks))
  for start in range(0, len(picks) - batch + 1, batch):
    pictures = [source.items[i][0] for i in picks[start:start + batch]]
    padded = [words.pad(words.encode(source.captions[i])[0]) for i in pictures]
    yield {
        "tokens": source.sequences(pictures),
        "inputs": source.sequences(pictures),
        "prompt": np.stack([p for p, _ in padded]),
        "mask": np.stack([m for _, m in padded]),
    }
