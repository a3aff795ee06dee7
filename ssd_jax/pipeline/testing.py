"""Pipelines so small that all images they can generate can be enumerated."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssd_jax.core.grid import Grid
from ssd_jax.families import emoji
from ssd_jax.models import rope
from ssd_jax.models.drafter import DraftNet, bind_drafter
from ssd_jax.models.generator import Generator
from ssd_jax.models.spatial_heads import (
  HeadsConfig,
  HeadsOptions,
  SpatialHeads,
  bind_heads,
)
from ssd_jax.models.transformer import TrunkConfig
from ssd_jax.models.vocabulary import Vocabulary
from ssd_jax.models.vq import VQ, VQConfig
from ssd_jax.pipeline.pipeline import Pipeline

_PROMPT_SLOTS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class TinyFamily(emoji.Emoji):
  """A family for tests: texts as bytes, any grid, a random trunk.

  Attributes:
    grid: The image as a sequence.
    vocab: Image tokens V.
  """

  grid: Grid = Grid(2, 2)
  vocab: int = 3

  name = "tiny"

  @functools.cached_property
  def vq(self) -> VQ:
    """An image tokenizer with 2 x 2 pixels per token."""
    return VQ(VQConfig(
        ch=4, ch_mult=(1,), num_res_blocks=1, z_channels=4,
        n_codes=self.vocab, code_dim=4, attn_levels=(), patch=2, groups=2,
    ))

  @functools.cached_property
  def generator(self) -> Generator:
    """A trunk with two layers of width 16."""
    cfg = TrunkConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32,
        vocab_in=self.words.size + self.vocab + 1, vocab_out=self.vocab,
        qk_norm=True,
    )
    slots = _PROMPT_SLOTS + self.grid.length
    return Generator(
        cfg, self.grid, rope.table_1d(slots, cfg.head_dim, 100.0),
        self.words.size + np.arange(self.vocab + 1, dtype=np.int32),
    )


def tiny(
    vocab: int = 3, rows: int = 2, cols: int = 2, end_of_row: bool = False,
    seed: int = 0, heads: tuple[int, int] = (5, 5), guidance: float = 1.0,
) -> Pipeline:
  """Returns a random float32 pipeline, heads and drafter included.

  Its predictions are peaked and depend on the context.

  Args:
    vocab: Image tokens V.
    rows: Rows of the grid.
    cols: Columns of the grid.
    end_of_row: Whether a forced token ends each row.
    seed: Seed of the parameters.
    heads: Numbers of (horizontal, vertical) spatial heads; (0, 0) for none.
    guidance: Default guidance scale; 1 runs a single stream.
  """
  config = ml_collections.ConfigDict(dict(sampling=dict(
      guidance=guidance, temperature=1.0, top_k=0, top_p=1.0)))
  family = TinyFamily(
      config, Vocabulary((), _PROMPT_SLOTS), Grid(rows, cols, end_of_row), vocab
  )
  keys = jax.random.split(jax.random.key(seed), 4)
  params = jax.jit(family.generator.init)(keys[0])
  trunk = params["trunk"]
  # Large embeddings and a moderate head: predictions that depend on context.
  trunk = {**trunk, "embedding": 30.0 * trunk["embedding"],
           "head": 1.2 * trunk["head"]}
  pixels = jnp.zeros((1, 2 * rows, 2 * cols, 3))
  vq_params = jax.jit(family.vq.init)(keys[1], pixels)["params"]
  generator, params = family.generator, {"trunk": trunk}
  params["drafter"] = DraftNet(generator).init(keys[2])
  model = generator.model()
  if sum(heads):
    cfg = HeadsConfig.make(generator, HeadsOptions(*heads))
    params["heads"] = SpatialHeads(generator, cfg).init(keys[3])
    model = bind_heads(generator, cfg, params)
  model = bind_drafter(generator, model)
  return Pipeline(family, params, vq_params, model)


def every_image(pipe: Pipeline) -> np.ndarray:
  """Returns all token grids of a tiny pipeline, int32 [V^(R*C), R, C]."""
  grid = pipe.model.grid
  grids = itertools.product(range(pipe.model.vocab), repeat=grid.num_tokens)
  return np.array(list(grids), np.int32).reshape(-1, grid.rows, grid.cols)
