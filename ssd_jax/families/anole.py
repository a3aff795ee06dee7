"""Anole-7B (Chern et al. 2024, arXiv:2407.06135): Chameleon that draws.

A square of 32 x 32 codes without row ends. The unconditional stream is the
begin-of-sequence and begin-of-image tokens. The native checkpoint turns
neighbouring pairs of a head, transformers' halves; both become halves here.
"""

from collections.abc import Iterable
import functools
import pathlib

import ml_collections
import numpy as np

from ssd_jax.convert.recipes import (
  Part,
  Recipe,
  Row,
  Source,
  Table,
  chain,
  halves,
  image_head,
  native_layers,
  repeat_heads,
  split_heads,
  table_rows,
  vq_shapes,
)
from ssd_jax.convert.vq_recipes import vq_rows
from ssd_jax.core.grid import Grid
from ssd_jax.families import lumina, published, training_defaults
from ssd_jax.families.published import Ids
from ssd_jax.models.transformer import TrunkConfig

VARIANTS = ("native", "hf")
_KEEP = ("trunk", "vq", "theta", "ids", "side", "sampling", "tokenizer")
_NATIVE = ("**/consolidated.pth", "**/consolidated.*.pth")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Settings; the variants name the checkpoint's layout, "" is "native"."""
  variant = variant or "native"
  if variant not in VARIANTS:
    raise published.bad_variant("anole", variant, VARIANTS)
  config = lumina.chameleon()
  config.family = "anole"
  config.workdir = "runs/anole"
  config.layout = variant
  config.side = 32  # cells
  config.tokenizer = (
      "text_tokenizer.json" if variant == "native" else "tokenizer.json")
  config.sampling = ml_collections.ConfigDict(dict(
      guidance=3.0, temperature=0.7, top_k=0, top_p=0.9))
  training_defaults.add(config, prompts=20_000, batch=4 * 32)
  return config


class Anole(lumina.Chameleon):
  """The family as a pipeline holds it."""

  @functools.cached_property
  def grid(self) -> Grid:
    """A plain raster."""
    return Grid(self.config.side, self.config.side)

  @functools.cached_property
  def input_ids(self) -> np.ndarray:
    """Codes."""
    return lumina.chameleon_input_ids(self.config)[:-1]

  def streams(self, text: str) -> tuple[Ids, Ids]:
    """The text as it is; and an image without text."""
    ids = self.config.ids
    prompt = (ids.start, *self.text_ids(text), ids.end_of_turn, ids.image)
    return prompt, (ids.start, ids.image)


def recipe(config: ml_collections.ConfigDict) -> Recipe:
  """How a model folder is made of the published files."""
  family = Anole(config)
  settings = published.settings_of(config, _KEEP)
  shapes = published.trunk_shapes(family.trunk)
  if config.layout == "native":
    table = Table(tuple(_native_rows(family)), (r"rope\.freqs",))
    parts = (Part("source", _NATIVE, table, shapes),
             lumina.chameleon_vq(family))
    tokenizer = "**/" + config.tokenizer
    return Recipe(config.family, settings, parts, (tokenizer,))
  vq = family.vq.cfg
  rows = (*lumina.huggingface_rows(family),
          *vq_rows(vq, "taming", "model.vqmodel."))
  part = Part("source", published.ANY_FORMAT, Table(rows),
              shapes | vq_shapes(vq))
  return Recipe(config.family, settings, (part,), (config.tokenizer,))


def _native_rows(family: Anole) -> Iterable[Row]:
  cfg, ids = family.trunk, family.config.ids
  size = (cfg.vocab_in, cfg.d_model)
  yield table_rows("tok_embeddings.weight", *size)
  yield from native_layers(cfg, _attention_rows(cfg))
  yield image_head("output.weight", size, ids.first_code, cfg.vocab_out)


def _attention_rows(cfg: TrunkConfig) -> Iterable[Row]:
  d, h = cfg.d_model, cfg.head_dim
  for i in range(cfg.n_layers):
    at = f"layers.{i}.attention"
    for ours, n in (("q", cfg.n_heads), ("k", cfg.n_kv_heads)):
      target = f"trunk/layers/attn/{ours}"
      yield Row(target, (Source(f"{at}.w{ours}.weight", (n * h, d)),),
                chain(halves(n), split_heads(n)), i)
      for part, name in (("scale", "weight"), ("bias", "bias")):
        source = Source(f"{at}.{ours}_normalization.{name}", (h,))
        yield Row(f"{target}_norm/{part}", (source,),
                  chain(halves(1), repeat_heads(n, h)), i)
    n = cfg.n_kv_heads
    yield Row("trunk/layers/attn/v", (Source(f"{at}.wv.weight", (n * h, d)),),
              split_heads(n), i)


def from_settings(settings: dict, folder: pathlib.Path | None) -> Anole:
  """The family of a model.json."""
  return Anole(ml_collections.ConfigDict(settings["config"]), folder)
