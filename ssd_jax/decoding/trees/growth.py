"""Grows a draft tree with the drafter, level by level, for one image.

The children of a node are the tokens that rank highest by

  "top"      the drafter's probability q;
  "coupled"  log q plus the slot's own Gumbel noise, with which the target's
             token will be sampled: the draft then predicts the sample itself;
  "sampled"  log q plus fresh noise: samples from q without replacement.

A forced slot is a level with one child per node. Levels beyond the end of the
image have no children.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.core.types import KVCache, Queries
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.trees.shapes import Dynamic, Static, Tree

DRAFTS = ("top", "coupled", "sampled")
PURPOSE = 0  # purpose of the random key of sampled drafts


@flax.struct.dataclass
class Draft:
  """A tree of T nodes to verify; node j is query j + 1, the root is query 0.

  Attributes:
    tokens: int32 [T], drafts.
    parent: int32 [T], the query of each node's parent.
    depth: int32 [T], levels below the root.
    exists: bool [T], which nodes exist.
    visible: bool [T, T], which nodes each sees: its ancestors and itself.
    q: float32 [T + 1, V], distribution that each query's children were sampled
      from; None unless they were sampled.
  """

  tokens: jax.Array
  parent: jax.Array
  depth: jax.Array
  exists: jax.Array
  visible: jax.Array
  q: jax.Array | None


@flax.struct.dataclass
class Children:
  """The children of F nodes of one level, best first.

  Attributes:
    tokens: int32 [F, K], drafts.
    score: float32 [F, K], log-probability of each child; -inf where none
      exists.
    q: float32 [F, V], the drafter's distribution.
  """

  tokens: jax.Array
  score: jax.Array
  q: jax.Array


@flax.struct.dataclass
class Roots:
  """The root of a tree.

  Attributes:
    slot: int32 [], the root's slot.
    hidden: [G, D], the drafter's prediction of the root's hidden state.
    cache: The drafter's cache, filled up to the root.
  """

  slot: jax.Array
  hidden: jax.Array
  cache: KVCache


@flax.struct.dataclass
class _Front:
  """The nodes of a level that are expanded next.

  Attributes:
    tokens: int32 [F], their tokens.
    score: float32 [F], log-probabilities of their paths.
    candidate: int32 [F], each node's index among all drafted nodes.
    hidden: [G, F, D], predicted hidden states of their parents.
    seen: bool [F, U], scratch slots of their ancestors in the drafter's cache.
    cache: The drafter's cache.
  """

  tokens: jax.Array
  score: jax.Array
  candidate: jax.Array
  hidden: jax.Array
  seen: jax.Array
  cache: KVCache


def grow(ctx: Context, tree: Tree, drafts: str, root: Roots) -> Draft:
  """Grows the tree of drafts below a root.

  Args:
    ctx: Context of the pass.
    tree: Shape of the tree.
    drafts: How children are selected, one of DRAFTS.
    root: The root. Its cache is extended only while the tree grows.

  Returns:
    The tree.
  """
  if isinstance(tree, Dynamic):
    return _grow_dynamic(ctx, tree, drafts, root)
  return _grow_static(ctx, tree, drafts, root)


def _grow_static(
    ctx: Context, tree: Static, drafts: str, root: Roots
) -> Draft:
  hidden_GFD, cache = root.hidden[:, None], root.cache
  tokens_T = jnp.zeros(tree.nodes, jnp.int32)
  exists_T = jnp.zeros(tree.nodes, bool)
  q_QV = None
  if drafts == "sampled":
    q_QV = jnp.zeros((tree.nodes + 1, ctx.model.vocab))
  seen_FU = np.zeros((1, tree.scratch), bool)
  first = 0  # scratch slot of the level
  for level, inner in enumerate(tree.inner):
    if level:
      above = np.searchsorted(tree.inner[level - 1], tree.parent[inner - 1])
      own = first + np.arange(len(inner))
      seen_FU = seen_FU[above] | (np.arange(tree.scratch) == own[:, None])
      hidden_GFD, cache = _feed(
          ctx, cache, hidden_GFD[:, above], tokens_T[inner - 1],
          jnp.where(exists_T[inner - 1], own, tree.scratch),
          root.slot, level, jnp.asarray(seen_FU),
      )
      first += len(inner)
    nodes = np.flatnonzero(tree.depth_of == level + 1)
    family = np.searchsorted(inner, tree.parent[nodes])
    rank = tree.rank[nodes]
    children = _children(
        ctx, hidden_GFD, root.slot + level + 1, rank.max() + 1, drafts, level
    )
    tokens_T = tokens_T.at[nodes].set(children.tokens[family, rank])
    has_parent = True if not level else exists_T[tree.parent[nodes] - 1]
    exists_T = exists_T.at[nodes].set(
        has_parent & jnp.isfinite(children.score[family, rank]))
    if q_QV is not None:
      q_QV = q_QV.at[inner].set(children.q)
  parent_T = jnp.asarray(tree.parent)
  return Draft(
      tokens_T, parent_T, jnp.asarray(tree.depth_of), exists_T,
      ancestors(parent_T, tree.depth), q_QV,
  )


def _grow_dynamic(
    ctx: Context, tree: Dynamic, drafts: str, root: Roots
) -> Draft:
  width = tree.width
  top = _children(ctx, root.hidden[:, None], root.slot + 1, width, drafts, 0)
  front = _Front(
      top.tokens[0], top.score[0], jnp.arange(width),
      jnp.repeat(root.hidden[:, None], width, axis=1),
      jnp.zeros((width, tree.scratch), bool), root.cache,
  )

  def widen(front: _Front, level):
    own = (level - 1) * width + jnp.arange(width)
    seen_FU = front.seen | (jnp.arange(tree.scratch) == own[:, None])
    hidden_GFD, cache = _feed(
        ctx, front.cache, front.hidden, front.tokens,
        jnp.where(jnp.isfinite(front.score), own, tree.scratch),
        root.slot, level, seen_FU,
    )
    children = _children(
        ctx, hidden_GFD, root.slot + level + 1, width, drafts, level)
    tokens = children.tokens.ravel()
    score = (front.score[:, None] + children.score).ravel()
    score_F, best_F = jax.lax.top_k(score, width)
    above_F = best_F // width
    first = width + (level - 1) * width**2  # candidate of the level
    after = _Front(
        tokens[best_F], score_F, first + best_F, hidden_GFD[:, above_F],
        seen_FU[above_F], cache,
    )
    return after, (tokens, score, jnp.repeat(front.candidate, width))

  levels = jnp.arange(1, tree.depth)
  _, (tokens, score, parent) = jax.lax.scan(widen, front, levels)
  tokens = jnp.concatenate([top.tokens[0], tokens.ravel()])
  score = jnp.concatenate([top.score[0], score.ravel()])
  parent = jnp.concatenate([jnp.full(width, -1), parent.ravel()])
  depth = np.repeat(np.arange(1, tree.depth + 1),
                    [width] + [width**2] * (tree.depth - 1))
  # A child never scores higher than its parent, and ties keep the first node,
  # so the parents of kept nodes are kept.
  kept_T = jnp.sort(jax.lax.top_k(score, tree.nodes)[1])
  above_T = parent[kept_T]
  parent_T = jnp.where(above_T < 0, 0, 1 + jnp.searchsorted(kept_T, above_T))
  parent_T = parent_T.astype(jnp.int32)
  return Draft(
      tokens[kept_T], parent_T, jnp.asarray(depth, jnp.int32)[kept_T],
      jnp.isfinite(score[kept_T]), ancestors(parent_T, tree.depth), None,
  )


def ancestors(parent_T: jax.Array, depth: int) -> jax.Array:
  """Returns whether node j is node i or its ancestor, bool [T, T].

  Args:
    parent_T: int32, the query of each node's parent.
    depth: Levels of the tree.
  """
  nodes = jnp.arange(len(parent_T))
  visible_TT = jnp.eye(len(parent_T), dtype=bool)
  above_T = parent_T
  for _ in range(depth - 1):
    visible_TT |= above_T[:, None] == nodes + 1
    above_T = jnp.where(above_T > 0, parent_T[above_T - 1], 0)
  return visible_TT


def _feed(
    ctx, cache, hidden_GFD, tokens_F, scratch_F, root, level, seen_FU
) -> tuple[jax.Array, KVCache]:
  """Feeds a level's nodes to the drafter.

  Returns:
    The nodes' predicted hidden states [G, F, D], and the updated cache.
  """
  length = ctx.model.grid.length
  committed = jnp.broadcast_to(
      jnp.arange(length) <= root, (len(tokens_F), length))
  position = jnp.minimum(root + level, length - 1)
  queries = Queries(
      tokens_F, jnp.full_like(tokens_F, position), length + scratch_F,
      jnp.concatenate([committed, seen_FU], axis=-1),
  )
  return ctx.model.drafter.forward(ctx.params, cache, hidden_GFD, queries)


def _children(ctx, hidden_GFD, slot, width, drafts, level) -> Children:
  """Returns the `width` best tokens of `slot` for each of F nodes."""
  grid, vocab = ctx.model.grid, ctx.model.vocab
  q_FV = ctx.target(ctx.model.logits(ctx.params, hidden_GFD))
  order_FV = jnp.log(q_FV)
  if drafts == "coupled":
    order_FV += ctx.token_noise(slot[None])
  elif drafts == "sampled":
    key = jax.random.fold_in(ctx.pass_key(PURPOSE), level)
    order_FV += jax.random.gumbel(key, q_FV.shape)
  score_FK, tokens_FK = jax.lax.top_k(order_FV, width)
  score_FK -= jax.nn.logsumexp(order_FV, axis=-1, keepdims=True)
  # Rounding must not let a child score higher than its parent.
  score_FK = jnp.minimum(score_FK, 0.0)
  is_forced = jnp.asarray(grid.is_forced).at[slot].get(
      mode="fill", fill_value=False)
  alone = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
  score_FK = jnp.where(is_forced, alone, score_FK)
  return Children(
      jnp.where(is_forced, vocab, tokens_FK).astype(jnp.int32),
      jnp.where(slot < grid.length, score_FK, -jnp.inf), q_FV,
  )
