"""Acceptance of a drafter on AR's images, and the best static tree for it."""

import dataclasses
import pathlib

import numpy as np

from ssd_jax.decoding.trees import shapes as tree_shapes
from ssd_jax.storage.files import write_text

WIDTH = 10  # ranks that are distinguished
NODES = 59  # nodes of the tree that is built from the ranks


@dataclasses.dataclass(frozen=True, eq=False)
class Acceptance:
  """Acceptance of a drafter on images that the trunk generated.

  Attributes:
    ranks_IRD: int [images, roots, depth], rank of AR's next token among the
      drafts, given slot r as the root and d tokens of AR below it; WIDTH or
      more if no draft is that token or the slot is beyond the image.
    rates_DK: Of the paths of d tokens of AR, all drafted, the share that the
      draft of rank k continues.
    tree: The best static tree of NODES nodes, or fewer on a smaller image.
  """

  ranks_IRD: np.ndarray
  rates_DK: np.ndarray
  tree: tree_shapes.Static

  @classmethod
  def of(cls, ranks_IRD: np.ndarray, vocab: int) -> "Acceptance":
    """Returns the acceptance, counted over paths that end within the image.

    Args:
      ranks_IRD: int [images, roots, depth], see the attributes.
      vocab: Size of the token vocabulary.
    """
    roots, depth = ranks_IRD.shape[1:]
    ranks = ranks_IRD[:, :roots - depth + 1]
    is_drafted = np.cumprod(ranks < WIDTH, axis=-1, dtype=bool)
    is_tried = np.roll(is_drafted, 1, axis=-1)
    is_tried[..., 0] = True
    is_rank = ranks[..., None] == np.arange(min(WIDTH, vocab))
    right_DK = (is_rank & is_tried[..., None]).sum((0, 1))
    rates_DK = right_DK / np.maximum(is_tried.sum((0, 1)), 1)[:, None]
    nodes = min(NODES, roots + 1)  # a tree is no larger than the image
    return cls(ranks_IRD, rates_DK, tree_shapes.search(rates_DK, nodes))

  def length(self, tree: tree_shapes.Static) -> float:
    """Returns the mean accepted length: slots committed per verifying pass.

    A draft is accepted exactly where it equals AR's token, so a walk over AR's
    images from root to root reproduces `eagle` with this tree.
    """
    slots = passes = 0
    paths = set(tree.paths)
    for ranks_RD in self.ranks_IRD:
      root = 0
      while root < len(ranks_RD):
        path: tuple[int, ...] = ()
        while (*path, ranks_RD[root, min(len(path), tree.depth - 1)]) in paths:
          path = (*path, ranks_RD[root, len(path)])
        root, passes = root + 1 + len(path), passes + 1
      slots += len(ranks_RD)
    return slots / passes

  def write(self, path: pathlib.Path) -> None:
    """Writes a table of all figures and the tree, atomically."""
    depth, width = self.rates_DK.shape
    chain = tree_shapes.branching((1,) * depth)
    lines = [
        "| level | " + " | ".join(f"rank {k}" for k in range(width)) + " |",
        "|---" * (width + 1) + "|",
        *(f"| {d + 1} | " + " | ".join(f"{x:.4f}" for x in row) + " |"
          for d, row in enumerate(self.rates_DK)),
        "",
        f"Mean accepted length on {len(self.ranks_IRD)} held-out images, in "
        f"slots per pass: {self.length(self.tree):.3f} with the best tree of "
        f"{self.tree.nodes} nodes, {self.length(chain):.3f} with a chain.",
        "",
        f"`eagle:tree={tree_shapes.tree_name(self.tree)}`",
    ]
    write_text(path, "\n".join(lines) + "\n")
