"""The drafter: the same function with and without its cache, and binding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.core.grid import Grid
from ssd_jax.core.types import Queries
from ssd_jax.decoding.ar import AR
from ssd_jax.decoding.trees.eagle import Eagle
from ssd_jax.decoding.trees.relaxed import Cascade
from ssd_jax.families.emoji import slot_positions
from ssd_jax.models import rope
from ssd_jax.models.drafter import DrafterConfig, DraftNet, bind_drafter
from ssd_jax.models.generator import Generator
from ssd_jax.models.transformer import TrunkConfig
from ssd_jax.pipeline import testing


def _generator(**options):
  """A trunk on a 2x3 grid, its places one- or two-dimensional."""
  grid, vocab = Grid(2, 3), 5
  cfg = TrunkConfig(
      d_model=16, n_layers=1, n_heads=2, n_kv_heads=options["n_kv_heads"],
      head_dim=8, d_ff=32, vocab_in=vocab + 2, vocab_out=vocab,
      qk_norm=options["qk_norm"], interleaved=options["flat"],
  )
  if options["flat"]:
    table = rope.table_1d(4 + grid.length, 8, 100.0)
  else:
    table = rope.table_2d(slot_positions(4, 2, 3), 8, 100.0)
  return Generator(cfg, grid, table, np.arange(vocab + 1, dtype=np.int32),
                   taps=options.get("taps", ()))


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    dict(n_kv_heads=1, qk_norm=True, flat=False),
    dict(n_kv_heads=2, qk_norm=False, flat=True, taps=(0,)),
])
def test_a_path_through_the_cache_is_the_unrolled_forward(options):
  """Drafting step by step equals the uncached forward that training uses."""
  generator = _generator(**options)
  net = DraftNet(generator)
  params = generator.init(jax.random.key(0))
  params["drafter"] = net.init(jax.random.key(1))
  length = generator.grid.length
  width = 16 * (1 + len(generator.taps))
  hidden_GND = jax.random.normal(jax.random.key(2), (2, length, width))
  tokens = jnp.array([1, 4, 0, 2, 3, 1])
  expected = net.unroll(params, hidden_GND, jnp.stack([tokens] * 2), 3)
  root = 2
  slots = jnp.arange(root + 1)
  hidden, cache = net.forward(
      params, net.cache(2, 2), hidden_GND[:, :root + 1],
      Queries(tokens[slots], slots, slots,
              jnp.arange(length + 2) <= slots[:, None]),
  )
  np.testing.assert_allclose(hidden, expected[0][:, :root + 1], atol=1e-5)
  seen = jnp.arange(length + 2) <= root
  for step in (1, 2):
    slot, scratch = jnp.array([root + step]), jnp.array([length + step - 1])
    seen = seen.at[scratch].set(True)
    hidden, cache = net.forward(
        params, cache, hidden[:, -1:],
        Queries(tokens[slot], slot, scratch, seen[None]),
    )
    np.testing.assert_allclose(
        hidden[:, 0], expected[step][:, root + step], atol=1e-5)


def test_a_drafter_of_another_trunk_is_refused():
  """One line says what does not fit: weights, grid or shapes."""
  generator = _generator(n_kv_heads=1, qk_norm=True, flat=True)
  params = generator.init(jax.random.key(0))
  params["drafter"] = DraftNet(generator).init(jax.random.key(1))
  model, cfg = generator.model(), DrafterConfig.make(generator, params)
  bind = functools.partial(bind_drafter, generator, model)
  assert bind(cfg, params).drafter is not None
  other = {**params, "trunk": jax.tree.map(lambda x: x + 1, params["trunk"])}
  with pytest.raises(UserError, match="another trunk's weights"):
    bind(cfg, other)
  with pytest.raises(UserError, match="rows=3 instead of 2"):
    bind(dataclasses.replace(cfg, rows=3), params)
  with pytest.raises(UserError, match="layers of another shape"):
    bind(cfg, {**params, "drafter": {}})


@pytest.mark.slow
def test_a_drafter_of_several_layers_drafts_for_the_same_trunk():
  """EAGLE-3's: the trunk's states are followed by the layers it taps; trees
  of its drafts yield AR's tokens."""
  pipe = testing.tiny(rows=2, cols=3, end_of_row=True, guidance=2.0)
  plain = pipe.family.generator
  generator = dataclasses.replace(plain, taps=(0, 1))
  prompt, _ = pipe.family.encode_prompts(["ab"], False)
  sequence = pipe.sequence(np.zeros((1, 2, 3), int))
  wide = generator.hidden(pipe.params, prompt, sequence)
  hidden = plain.hidden(pipe.params, prompt, sequence)
  np.testing.assert_allclose(wide[..., :16], hidden, atol=1e-5)
  np.testing.assert_allclose(wide[..., 32:], hidden, atol=1e-5)  # the last one
  np.testing.assert_allclose(
      generator.logits(pipe.params, wide), plain.logits(pipe.params, hidden),
      atol=1e-5)
  params = {**pipe.params, "drafter": DraftNet(generator).init(
      jax.random.key(3))}
  model = bind_drafter(
      plain, pipe.model, DrafterConfig.make(generator, params), params)
  tapped = dataclasses.replace(pipe, model=model, params=params)
  draw = lambda pipe, decoder: pipe.generate(["ab"] * 8, decoder, batch=8)
  expected = draw(pipe, AR())
  for decoder in (Eagle(), Cascade(tau_position=1.01, tau_sequence=1.01)):
    out = draw(tapped, decoder)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
  with pytest.raises(UserError, match="more layers than 2"):
    bind_drafter(plain, pipe.model, dataclasses.replace(
        DrafterConfig.make(generator), taps=(2,)))
