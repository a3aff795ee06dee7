"""Static shapes of draft trees.

A string names a tree, so that it can be given on a command line:

  "mc_sim", "medusa", "binary"    static, published
  "naive_extend"                  static, published: LANTERN's
  "dynamic", "dynamic_lantern"    grown by the drafter's scores, published
  "dynamic-59-10-8"               59 nodes, 10 children each, 8 levels
  "4-2-1"                         4 children, each has 2, each of those has 1
  "0/1/00/01/000"                 the ranks of each node's ancestors and its own

Published shapes are reduced to fit a small image; others must fit it as given.
"""

from collections.abc import Callable
import dataclasses
import functools
import heapq
import itertools
import operator
import re

import numpy as np

from ssd_jax.core.config import UserError, check

Path = tuple[int, ...]
MAX_NODES = 1024

# EAGLE's tree of 25 nodes, LANTERN's default static tree of 57 nodes and
# Medusa's of 63, as ranks along each path.
_MC_SIM = (
    "0/1/2/3/00/01/02/10/11/20/21/30/000/001/002/010/011/020/021/100/0000/"
    "0001/0002/00000/00001"
)
_NAIVE_EXTEND = (
    "0/1/2/3/4/00/01/02/03/10/11/12/20/21/22/30/31/40/000/001/002/003/010/"
    "011/012/020/021/022/030/031/100/101/110/200/0000/0001/0002/0003/0010/"
    "0011/0012/0020/0021/0030/0100/0101/0110/0200/00000/00001/00002/00010/"
    "00011/00100/00101/00110/00200"
)
_MEDUSA = (
    "0/1/2/3/4/5/6/7/8/9/00/01/02/03/04/05/06/07/08/09/10/11/12/13/14/15/16/"
    "20/21/22/30/31/40/50/60/70/80/90/000/001/002/003/004/005/006/007/008/009/"
    "010/011/012/020/021/030/040/050/060/070/100/101/200/0000/0001"
)


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """EAGLE-2's tree: expands the best nodes per level, keeps the best overall.

  Attributes:
    nodes: Nodes verified in a pass, not counting the root.
    width: Children of a node, and nodes expanded per level.
    depth: Number of levels.

  Source: Li et al. 2024, EAGLE-2, arXiv:2406.16858, section 4.
  """

  nodes: int
  width: int
  depth: int

  @property
  def candidates(self) -> int:
    """Number of nodes drafted, of which `nodes` are kept."""
    return self.width + (self.depth - 1) * self.width**2

  @property
  def scratch(self) -> int:
    """Slots that the drafter needs beyond the sequence."""
    return (self.depth - 1) * self.width


@dataclasses.dataclass(frozen=True)
class Static:
  """A fixed tree. Node j is query j + 1 of a pass; query 0 is the root.

  Attributes:
    paths: For each node, the ranks of its ancestors below the root and its own;
      sorted by length, then by ranks, so that parents and better siblings come
      first.
  """

  paths: tuple[Path, ...]

  @property
  def nodes(self) -> int:
    """Number of nodes verified in a pass, not counting the root."""
    return len(self.paths)

  @property
  def depth(self) -> int:
    """Number of levels."""
    return len(self.paths[-1])

  @functools.cached_property
  def width(self) -> int:
    """Largest number of children of a node."""
    return 1 + max(path[-1] for path in self.paths)

  @functools.cached_property
  def parent(self) -> np.ndarray:
    """The query of each node's parent, int32 [T]."""
    query = {path: j + 1 for j, path in enumerate(self.paths)} | {(): 0}
    return np.array([query[path[:-1]] for path in self.paths], np.int32)

  @functools.cached_property
  def depth_of(self) -> np.ndarray:
    """Each node's level, int32 [T]; children of the root have level 1."""
    return np.array([len(path) for path in self.paths], np.int32)

  @functools.cached_property
  def rank(self) -> np.ndarray:
    """Each node's rank among its siblings, int32 [T]."""
    return np.array([path[-1] for path in self.paths], np.int32)

  @functools.cached_property
  def inner(self) -> tuple[np.ndarray, ...]:
    """Queries with children, by level; the first level is the root."""
    queries = np.unique(self.parent)
    depths = np.concatenate([[0], self.depth_of])[queries]
    return tuple(queries[depths == d] for d in range(self.depth))

  @property
  def scratch(self) -> int:
    """Slots that the drafter needs beyond the sequence."""
    return sum(len(level) for level in self.inner[1:])


Tree = Static | Dynamic


def static(paths) -> Static:
  """Returns the static tree with the given paths, in any order.

  Args:
    paths: For each node, the ranks of its ancestors and its own.

  Raises:
    UserError: A node's parent or a better sibling is missing.
  """
  paths = {tuple(path) for path in paths}
  for path in paths:
    before = (*path[:-1], path[-1] - 1) if path[-1] else path[:-1]
    if before and before not in paths:
      raise UserError(
          "Expected a tree with every node's parent and better siblings, got a "
          f"tree with {_path_name(path)} but without {_path_name(before)}. Add "
          "it."
      )
  return Static(tuple(sorted(paths, key=lambda path: (len(path), path))))


def branching(children: tuple[int, ...]) -> Static:
  """Returns the static tree in which nodes of level d have children[d] each."""
  return static(
      path
      for depth in range(1, len(children) + 1)
      for path in itertools.product(*map(range, children[:depth]))
  )


def search(rates_DK: np.ndarray, nodes: int) -> Static:
  """Returns the static tree with the largest expected number of accepted nodes.

  The value of a node is the product of the rates along its path, which never
  exceeds its parent's value; the best nodes are added one by one. Where a worse
  rank has a higher measured rate than a better one, the ranks involved are
  replaced by their mean.

  Args:
    rates_DK: Measured probability that the child of rank k of an accepted node
      of level d is accepted; the root is level 0.
    nodes: Number of nodes of the tree.
  """
  rates_DK = np.stack([_descending(row) for row in np.asarray(rates_DK)])
  depth, width = rates_DK.shape
  open_: list[tuple[float, tuple[int, ...]]] = [(-rates_DK[0, 0], (0,))]
  paths: list[tuple[int, ...]] = []
  while open_ and len(paths) < nodes:
    value, path = heapq.heappop(open_)
    paths.append(path)
    level, rank = len(path) - 1, path[-1]
    if rank + 1 < width and rates_DK[level, rank] > 0:
      sibling = value / rates_DK[level, rank] * rates_DK[level, rank + 1]
      heapq.heappush(open_, (sibling, (*path[:-1], rank + 1)))
    if level + 1 < depth:
      heapq.heappush(open_, (value * rates_DK[level + 1, 0], (*path, 0)))
  return static(paths)


def expected_length(tree: Static, rates_DK: np.ndarray) -> float:
  """Returns a static tree's mean tokens per pass: one plus accepted nodes."""
  value = lambda path: np.prod([rates_DK[d][k] for d, k in enumerate(path)])
  return 1.0 + float(sum(value(path) for path in tree.paths))


def tree_name(tree: Static) -> str:
  """Returns the string that names a static tree."""
  return "/".join(_path_name(path) for path in tree.paths)


_PUBLISHED: dict[str, Callable[[], Tree]] = {
    "mc_sim": lambda: _from_paths(_MC_SIM),
    "naive_extend": lambda: _from_paths(_NAIVE_EXTEND),
    "medusa": lambda: _from_paths(_MEDUSA),
    "binary": lambda: branching((2, 2, 2, 2)),
    "dynamic": lambda: Dynamic(59, 10, 8),
    "dynamic_lantern": lambda: Dynamic(58, 10, 5),
}


def parse(name: str) -> Tree:
  """Returns the tree with the given name.

  Raises:
    UserError: The name has none of the forms above.
  """
  if name in _PUBLISHED:
    return _PUBLISHED[name]()
  if re.fullmatch(r"dynamic(-\d{1,9}){3}", name):
    numbers = [int(part) for part in name.split("-")[1:]]
    if min(numbers) >= 1 and max(numbers) <= MAX_NODES:
      return _all_drafted(Dynamic(*numbers))
  if re.fullmatch(r"\d{1,9}(-\d{1,9})*", name):
    children = tuple(int(part) for part in name.split("-"))
    levels = itertools.accumulate(children, operator.mul)  # of any size
    if min(children) >= 1 and sum(levels) <= MAX_NODES:
      return branching(children)
  elif re.fullmatch(r"\d+(/\d+)*", name):
    return _from_paths(name)
  raise UserError(
      f"Expected tree to be one of {', '.join(_PUBLISHED)}, or numbers such as "
      f"dynamic-59-10-8, 4-2-1 or 0/1/00, got tree={name!r}."
  )


def fit(name: str, length: int, vocab: int) -> Tree:
  """Returns the tree with the given name, reduced to fit an image.

  Args:
    name: Name of the tree.
    length: Slots of the image.
    vocab: Number of image tokens V.

  Raises:
    UserError: The tree is not a published one and too large.
  """
  tree, levels = parse(name), max(1, length - 1)
  is_small = (
      tree.nodes <= length and tree.depth <= levels and tree.width <= vocab
  )
  if is_small:
    return tree
  if name not in _PUBLISHED:
    raise UserError(
        f"Expected a tree of at most {length} nodes, {levels} levels and "
        f"{vocab} children for this image, got tree={name} of {tree.nodes} "
        f"nodes, {tree.depth} levels and {tree.width} children. Use a smaller "
        "tree."
    )
  if isinstance(tree, Dynamic):
    depth, width = min(tree.depth, levels), min(tree.width, vocab)
    most = Dynamic(1, width, depth).candidates
    return Dynamic(min(tree.nodes, length, most), width, depth)
  fits = lambda path: len(path) <= levels and max(path) < vocab
  return Static(tuple(filter(fits, tree.paths))[:length])


def _all_drafted(tree: Dynamic) -> Dynamic:
  """Returns the tree; raises UserError if it has more nodes than it drafts."""
  check(tree.nodes <= tree.candidates, "nodes", tree.nodes,
        f"at most {tree.candidates}, the nodes that {tree.depth} levels of "
        f"{tree.width} children draft in a dynamic tree")
  return tree


def _from_paths(text: str) -> Static:
  return static(tuple(map(int, path)) for path in text.split("/"))


def _path_name(path: Path) -> str:
  return "".join(map(str, path))


def _descending(row: np.ndarray) -> np.ndarray:
  """Returns the closest non-increasing row (pool adjacent violators)."""
  blocks: list[tuple[float, int]] = []
  for value in row:
    blocks.append((float(value), 1))
    while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
      (a, n), (b, m) = blocks.pop(-2), blocks.pop(-1)
      blocks.append(((a * n + b * m) / (n + m), n + m))
  return np.concatenate([np.full(n, value) for value, n in blocks])
