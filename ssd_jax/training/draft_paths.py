"""How long the paths are that a drafter gets right, and the tree to draft."""

import dataclasses
import pathlib

import numpy as np

from ssd_jax.decoding.trees import shapes as tree_shapes
from ssd_jax.storage.files import write_text

WIDTH = 10  # ranks told apart
NODES = 59  # of the tree that is built from them


@dataclasses.dataclass(frozen=True, eq=False)
class Acceptance:
  """How a drafter fares on images that the trunk generated.

  Attributes:
    ranks_IRD: int [images, roots, depth]: with slot r as the root and d right
      tokens below it, the rank of the next right token among its drafts; WIDTH
      or more where it is none of them or beyond the image.
    rates_DK: Share of paths of d right tokens, all drafted, that the draft of
      rank k continues.
    tree: The best static tree of NODES nodes or the image's slots.
  """

  ranks_IRD: np.ndarray
  rates_DK: np.ndarray
  tree: tree_shapes.Static

  @classmethod
  def of(cls, ranks_IRD: np.ndarray, vocab: int) -> "Acceptance":
    """Counts the ranks of paths that end within the image, of `vocab` codes."""
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
    """Mean accepted length: slots made final per verifying pass.

    Given drafts are accepted exactly where they are what AR generates, so
    walking over AR's images from root to root tells what `eagle` does with this
    tree.
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
    """Writes a table of all figures and the tree, by one rename."""
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
