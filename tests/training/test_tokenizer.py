"""Training the image tokenizer: augmentation and the codebook's update."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.data import sources
from ssd_jax.training import tokenizer
from ssd_jax.training.tokenizer import TokenizerConfig, load_augmented


def test_codebook_starts_and_restarts_where_pixels_are_wrong():
  """Codes out of use become latents of wrong tokens, never of blank ones."""
  cfg = tokenizer.TokenizerConfig()
  z = jnp.concatenate([jnp.zeros((1, 8, 8, 4)), jnp.ones((1, 8, 8, 4))])
  error = jnp.concatenate([jnp.zeros((1, 8, 8)), jnp.ones((1, 8, 8))])
  stats = tokenizer.CodebookStats(jnp.ones(16), jnp.zeros((16, 4)))
  codes, stats = tokenizer.update_codebook(
      jnp.zeros((16, 4)), stats, (z, jnp.zeros((2, 8, 8), int), error),
      jax.random.key(0), True, cfg)
  np.testing.assert_allclose(codes, 1.0, atol=0.05)


def test_codebook_follows_its_latents():
  """In the long run a code is the mean of the latents that choose it."""
  cfg = tokenizer.TokenizerConfig(decay=0.5)
  z = jnp.full((1, 4, 4, 4), 3.0)
  codes = jnp.zeros((2, 4))
  stats = tokenizer.CodebookStats(jnp.ones(2), jnp.zeros((2, 4)))
  for _ in range(20):
    codes, stats = tokenizer.update_codebook(
        codes, stats, (z, jnp.zeros((1, 4, 4), int), jnp.ones((1, 4, 4))),
        jax.random.key(0), False, cfg)
  np.testing.assert_allclose(codes[0], 3.0, atol=1e-3)


def test_a_picture_may_stay_where_it_is():
  """max_shift=0 moves nothing; negative settings are one line."""
  source = sources.EmojiSource("validation", 32)
  rng = np.random.default_rng(0)
  image = load_augmented(source, 0, rng, 0)["image"]
  chex.assert_shape(image, (32, 32, 3))
  chex.assert_shape(load_augmented(source, 0, rng, 3)["image"], (32, 32, 3))
  with pytest.raises(
      UserError, match="Expected max_shift to be 0 or more, got max_shift=-1"):
    TokenizerConfig(max_shift=-1)
