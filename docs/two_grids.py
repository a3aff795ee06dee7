"""Measures what drafts from a preview save, on a toy of two grids.

    python docs/two_grids.py [STEPS]

The embedded model's trunk learns for STEPS steps to generate the 16 x 16 tokens
of an emoji after its name and a preview: the 8 x 8 tokens of the same emoji at
half the size, by the same tokenizer. Then it generates images after the
previews of held-out emoji, by GLM-Image's temperature and top-p. The toy says
what such drafts do where preview and image share a tokenizer of pixels; it says
nothing about GLM-Image's tokens, which are semantic.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ssd_jax
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Prompt
from ssd_jax.data.sources import EmojiSource
from ssd_jax.decoding import engine, registry
from ssd_jax.decoding.sampling import Sampling, target
from ssd_jax.families import emoji
from ssd_jax.models import rope
from ssd_jax.models.vq import to_float
from ssd_jax.pipeline import preview

BATCH, MOST, HELD_OUT = 8, 1600, 12
SMALL = Grid(8, 8)
AWAY = 32  # rows between the preview and the image
DECODERS = ("exact:drafts=above", "exact:drafts=copy", "exact:drafts=preview",
            "sjd", "sjd:init=repeat_above", "sjd:init=preview",
            "stair:lookahead=16", "stair:lookahead=16+drafts=preview")


def encode(pipe, images):
  """Returns tokens of uint8 images, int32 [B, R, C]."""
  @jax.jit
  def tokens(images):
    bound = lambda x, name: pipe.family.vq.apply(
        {"params": pipe.vq_params}, x, method=name)
    return bound(bound(to_float(images), "encode"), "quantize")

  parts = [np.asarray(tokens(images[i:i + 50]))
           for i in range(0, len(images), 50)]
  return np.concatenate(parts)


def load(pipe, split, most):
  """Returns (names, previews [B, 8, 8], images [B, 16, 16])."""
  source = EmojiSource(split)
  picks = np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)
  items = [source[int(i)] for i in picks]
  large = np.stack([x["image"] for x in items])
  small = large.reshape(len(large), 64, 2, 64, 2, 3).mean((2, 4))
  return ([x["caption"] for x in items],
          encode(pipe, np.round(small).astype(np.uint8)), encode(pipe, large))


def two_grids(pipe):
  """Returns the generator whose rotary table has rows of a preview."""
  old = pipe.family.generator
  places = emoji.slot_positions(pipe.family.words.length, 16, 16)
  r, c = np.mgrid[:8, :8].reshape(2, -1)
  small = np.stack([2 * r + 0.5 - AWAY, 2 * c + 0.5], axis=1)
  table = rope.table_2d(
      np.concatenate([places, small]), old.cfg.head_dim, emoji.THETA)
  return dataclasses.replace(old, rope=table, preview=SMALL)


def prompts(pipe, model, names, small, is_drafted=False):
  """Returns prompts that end with previews."""
  prompt, _ = pipe.family.encode_prompts(names, False)
  length, slots = prompt.tokens.shape[1], prompt.positions.shape[1]
  rows = np.r_[:length, slots:slots + SMALL.length, length:slots]
  prompt = prompt.replace(
      positions=jnp.broadcast_to(jnp.asarray(rows), (len(names), len(rows))))
  if is_drafted:
    prompt = preview.without_drafts(prompt)
  return preview.extend(prompt, model, small)


def train(pipe, generator, model, data, held_out, steps):
  """Returns the trunk's parameters after training."""
  names, small, large = data
  optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(
      0.0, 5e-4, 20, max(steps, 21), 1e-5), b2=0.98)
  params = dict(pipe.params["trunk"])
  state = optimizer.init(params)

  def nll(params, prompt: Prompt, tokens):
    tokens = tokens.reshape(len(tokens), -1)
    hidden = generator.hidden({"trunk": params}, prompt, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(
        generator.logits({"trunk": params}, hidden), tokens).mean()

  @jax.jit
  def step(params, state, prompt, tokens):
    loss, grads = jax.value_and_grad(nll)(params, prompt, tokens)
    change, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, change), state, loss

  rng, measure = np.random.default_rng(0), jax.jit(nll)
  check = [prompts(pipe, model, *held_out[:2]), jnp.asarray(held_out[2])]
  for i in range(steps):
    if i % 50 == 0:
      print(f"step {i}: held-out NLL {measure(params, *check):.3f} nats/token",
            flush=True)
    at = rng.choice(len(names), BATCH, replace=False)
    prompt = prompts(pipe, model, [names[j] for j in at], small[at])
    params, state, _ = step(params, state, prompt, jnp.asarray(large[at]))
  print(f"step {steps}: held-out NLL {measure(params, *check):.3f} nats/token")
  return params


def agreement(small, large, grid):
  """Prints how often a token equals its preview's, and its neighbours'."""
  share = lambda a, b: f"{np.mean(a == b):.3f}"
  print("a token equals the preview's", share(
      preview.upsampled(small, grid), large), "the one above",
        share(large[:, 1:], large[:, :-1]), "the one to the left",
        share(large[:, :, 1:], large[:, :, :-1]))


def main(steps):
  """Trains the toy and prints passes by decoder."""
  pipe = ssd_jax.load("emoji", extras=False)
  data, held_out = (load(pipe, *x) for x in (
      ("train", MOST), ("validation", HELD_OUT)))
  generator = two_grids(pipe)
  model = generator.model()
  agreement(*held_out[1:], model.grid)
  params = {"trunk": train(pipe, generator, model, data, held_out, steps)}
  settings = Sampling.make(
      guidance=1.0, temperature=0.9, top_k=0, top_p=0.75)
  names, small, large = held_out
  tokens = jnp.asarray(large.reshape(len(large), -1))
  logits = generator.logits(params, generator.hidden(
      params, prompts(pipe, model, names, small), tokens))
  p = np.asarray(target(logits[None], settings))
  given = preview.upsampled(small, model.grid).reshape(len(small), -1)
  print("mean p of the preview's token",
        np.take_along_axis(p, given[..., None], -1).mean(), "of the best",
        p.max(-1).mean())
  print("| decoder | passes |\n|---|---|")
  for text in DECODERS:
    decoder = registry.parse(text)
    prompt = prompts(pipe, model, names, small, decoder.needs(model).preview)
    out = engine.decode(model, decoder, params, prompt, settings,
                        jax.random.key(0), jnp.arange(len(names)))
    print(f"| `{text}` | {np.mean(out.passes):.1f} |", flush=True)


if __name__ == "__main__":
  main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
