"""The table of weights: the logical axes of each parameter's dimensions.

Sharding, int8 quantisation, weight layouts and Muon use it. A parameter is
identified by the end of its path; dimensions before the listed ones (stacked
layers, stacked heads) are batch dimensions. Parameters that are not listed
(norms, biases, the image tokenizer) are small.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

Axis = str | None


@dataclasses.dataclass(frozen=True)
class Weight:
  """The last dimensions of a parameter.

  Attributes:
    axes: Logical axis of each dimension: "embed" (the trunk's width), "width"
      (the same, of lookup tables), "heads", "hidden", "codes" (image tokens),
      or None for a dimension that is never sharded.
    contracted: Number of leading dimensions that a matmul contracts; 0 for
      tables and vectors.
    int8: Whether weight-only int8 quantises it.
    tiled: Whether inference on a CPU uses a copy in tiles.
  """

  axes: tuple[Axis, ...]
  contracted: int = 0
  int8: bool = False
  tiled: bool = False


def _product(*axes: Axis, contracted: int = 1, tiled: bool = False) -> Weight:
  return Weight(axes, contracted, int8=True, tiled=tiled)


WEIGHTS: Mapping[str, Weight] = {
    "embedding": Weight((None, "width")),
    "attn/q": _product("embed", "heads", None, tiled=True),
    "attn/k": _product("embed", "heads", None, tiled=True),
    "attn/v": _product("embed", "heads", None, tiled=True),
    "attn/o": _product("heads", None, "embed", contracted=2, tiled=True),
    "attn/q_bias": Weight(("heads", None)),
    "attn/k_bias": Weight(("heads", None)),
    "attn/v_bias": Weight(("heads", None)),
    "q_norm/scale": Weight(("heads", None)),
    "q_norm/bias": Weight(("heads", None)),
    "k_norm/scale": Weight(("heads", None)),
    "k_norm/bias": Weight(("heads", None)),
    "mlp/gate": _product("embed", "hidden", tiled=True),
    "mlp/up": _product("embed", "hidden", tiled=True),
    "mlp/down": _product("hidden", "embed", tiled=True),
    "head": _product("embed", "codes", tiled=True),
    "head_bias": Weight(("codes",)),
    "head_in": _product("embed", "hidden"),
    "head_in_bias": Weight(("hidden",)),
    "caption_in": Weight((None, "width"), 1),
    "caption_out": Weight((None, "width"), 1),
    # Spatial heads.
    "w0": _product("hidden", "embed"),
    "w1": _product("embed", "hidden"),
    "w2": _product("hidden", "embed"),
    "w3": _product("embed", "hidden"),
    # The drafter's fusion.
    "fuse/kernel": Weight(("hidden", "embed"), 1),
    "narrow": Weight(("hidden", "embed"), 1),
}


def weight_of(path: str, ndim: int) -> Weight | None:
  """Returns the weight at a path such as "trunk/layers/attn/q", if listed.

  Args:
    path: Keys joined by "/"; optimizer states end in their parameter's path.
    ndim: Number of dimensions of the array; one with fewer than listed is
      another parameter.
  """
  parts = path.split("/")
  for count in (2, 1):
    found = WEIGHTS.get("/".join(parts[-count:]))
    if found and ndim >= len(found.axes):
      return found
  return None


def path_of(keys: Any) -> str:
  """Returns a path of `jax.tree_util` as text, joined by "/"."""
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def leaves_by_path(tree: Any, prefix: str) -> dict[str, Any]:
  """Returns the leaves of a tree of dicts by path, `prefix` first."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {f"{prefix}/{path_of(keys)}": leaf for keys, leaf in flat}
