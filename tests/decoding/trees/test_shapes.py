"""Draft trees' shapes: published ones, their names, fitting, searching."""

import numpy as np
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding.trees import shapes as tree_shapes
from ssd_jax.decoding.trees.eagle import Eagle


def test_published_shapes_and_names():
  """Every way to name a tree gives the tree it says."""
  mc_sim = tree_shapes.parse("mc_sim")
  assert (mc_sim.nodes, mc_sim.depth) == (25, 5)
  assert [len(level) for level in mc_sim.inner] == [1, 4, 4, 1, 1]
  extended = tree_shapes.parse("naive_extend")
  assert (extended.nodes, extended.depth) == (57, 5)
  inner = {path[:-1] for path in extended.paths}
  assert len(set(extended.paths) - inner) == 33  # leaves
  assert tree_shapes.parse("medusa").nodes == 63
  assert tree_shapes.parse("2-2-1").nodes == 2 + 4 + 4
  assert tree_shapes.parse("1/0/00") == tree_shapes.static([(0, 0), (1,), (0,)])
  assert tree_shapes.parse("dynamic-59-10-8") == tree_shapes.parse("dynamic")
  assert tree_shapes.parse(tree_shapes.tree_name(mc_sim)) == mc_sim


@pytest.mark.parametrize("name", [
    "", "oak", "0/2", "00", "0-1", "dynamic-0-1-1", "99-99-99",
    "dynamic-12-2-2",  # more nodes than are drafted
    "-".join(["99"] * 10),  # more than a machine word counts
    pytest.param("2-" + "9" * 5000, id="digits")])
def test_a_name_that_is_no_tree_is_an_error(name):
  """Impossible trees are refused in one line."""
  with pytest.raises(UserError, match="Expected .*got"):
    Eagle(tree=name)


def test_trees_are_cut_to_small_images_or_refused():
  """Published shapes shrink to the image; explicit ones must fit it."""
  cut = tree_shapes.fit("mc_sim", length=4, vocab=3)
  assert cut.nodes == 4 and cut.depth <= 3 and cut.width <= 3
  assert tree_shapes.fit("dynamic", 4, 3) == tree_shapes.Dynamic(4, 3, 3)
  assert tree_shapes.fit("mc_sim", 256, 1024) == tree_shapes.parse("mc_sim")
  with pytest.raises(UserError, match="at most 4 nodes, 3 levels and 3 child"):
    tree_shapes.fit("2-2-1", 4, 3)


def test_search_takes_the_best_nodes():
  """The greedy tree is the best of all, and reports its expected length."""
  rates = np.array([[0.5, 0.3, 0.1], [0.4, 0.2, 0.0]])
  tree = tree_shapes.search(rates, 4)
  # Worth: 0 .5, 1 .3, 00 .2, 10 .12, 01 .1, 2 .1
  assert tree == tree_shapes.parse("0/1/00/10")
  np.testing.assert_allclose(
      tree_shapes.expected_length(tree, rates), 1 + 0.5 + 0.3 + 0.2 + 0.12)
  # Ranks that disagree count as equals; no node lacks its better sibling.
  assert tree_shapes.search(np.array([[0.1, 0.5]]), 2) == tree_shapes.parse(
    "0/1"
  )
