"""Draft trees: a drafter guesses several continuations, one pass verifies all.

A pass feeds the last final slot (the root) and T nodes below it; each node sees
what is final and its own ancestors. From the root on, a token is decided for
each slot in turn; while it is one of the drafted children, the walk goes on
below it. So every pass makes one token final, and one more for each accepted
node. Two exact ways to decide:

  Drafts that were given (top, coupled): the token is drawn from the target with
  its slot's own noise, as AR would; the output is AR's, token for token.

  Sampled drafts: each child in turn passes with probability min(1, p / q), else
  p becomes the residual max(0, p - q) and q loses the child. (EAGLE's and
  SpecInfer's rule; Gumbel noise of tests and draws is fresh in each pass.)

A relaxation moves mass of the target onto drafts before it is used: see
`relaxed`. What the target then is decides everything else, so that with nothing
moved a relaxed decoder is Eagle, token for token.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError, check
from ssd_jax.core.types import Drafter, KVCache, Model, Queries
from ssd_jax.decoding import sampling
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.trees import growth, shapes as tree_shapes
from ssd_jax.decoding.trees.growth import DRAFTS, Draft, Roots

_TEST_PURPOSE, _DRAW_PURPOSE = 1, 2


@flax.struct.dataclass
class TreeState:
  """One image's progress.

  Attributes:
    tokens: int32 [N].
    final: bool [N].
    next: int32 [], the root: the last slot of the final prefix, not yet fed.
    draft: The tree below the root.
    cache: The drafter's keys and values of the sequence, up to the root.
    source: int32 [D], scratch slots of the nodes accepted last.
    target: int32 [D], the slots they became; X is nowhere.
  """

  tokens: jax.Array
  final: jax.Array
  next: jax.Array
  draft: Draft
  cache: KVCache
  source: jax.Array
  target: jax.Array


@flax.struct.dataclass
class Family:
  """The K children of a node; those that do not exist come last.

  Attributes:
    queries: int32 [K].
    tokens: int32 [K].
    exists: bool [K].
    hidden: [K, D], hidden states of the conditional stream.
    parent: [D], of the node itself.
    q: float32 [V], what they were sampled from, or None.
  """

  queries: jax.Array
  tokens: jax.Array
  exists: jax.Array
  hidden: jax.Array
  parent: jax.Array
  q: jax.Array | None


@flax.struct.dataclass
class Walk:
  """What a pass decided. D + 1 steps, of which the first `count` were taken.

  Attributes:
    tokens: int32 [D + 1], of the slots after the root.
    queries: int32 [D + 1], the node that each step started from.
    count: int32 [], slots decided.
  """

  tokens: jax.Array
  queries: jax.Array
  count: jax.Array


@dataclasses.dataclass(frozen=True)
class Eagle:
  """Exact verification of a draft tree.

  Attributes:
    tree: Its shape, see `trees`.
    drafts: How children are picked, see `growth`.

  Source: Li et al. 2024, EAGLE, arXiv:2401.15077, and EAGLE-2,
  arXiv:2406.16858.
  """

  tree: str = "dynamic"
  drafts: str = "top"

  name = "eagle"

  def __post_init__(self):
    check(self.drafts in DRAFTS, "drafts", repr(self.drafts),
          f"one of {', '.join(DRAFTS)}")
    is_dynamic = isinstance(tree_shapes.parse(self.tree), tree_shapes.Dynamic)
    check(
        self.drafts != "sampled" or not is_dynamic, "drafts", "'sampled'",
        "top, or a static tree: a dynamic one keeps nodes by their tokens and "
        "would bias sampled ones",
    )

  def _refuse_coupled(self) -> None:
    """Raises UserError when a relaxed test would meet coupled drafts.

    A draft picked with the noise of the draw wins far more often for a little
    mass than a draft that knows nothing of it: no bound would hold.
    """
    check(self.lossless or self.drafts != "coupled", "drafts", "'coupled'",
          f"top or sampled where {self.name} relaxes")

  @property
  def lossless(self) -> bool:
    """Always."""
    return True

  def taken(
      self, ctx: Context, p_V: jax.Array, family: Family, child: jax.Array
  ) -> jax.Array:
    """float32 [V]: mass that a child takes from other tokens.

    Not asked for where the decoder is lossless.

    Args:
      ctx: Of the pass.
      p_V: What is left of the target after the better siblings failed.
      family: The child and its siblings.
      child: int32 [], index into the family.
    """
    del ctx, family, child
    return jnp.zeros_like(p_V)

  def scratch(self, model: Model) -> int:
    """The nodes of the tree."""
    self._drafter(model)
    return self._tree(model).nodes

  def _drafter(self, model: Model) -> Drafter:
    if model.drafter is None:
      raise UserError(
          f"got decoder {self.name} and a model without a drafter, expected "
          "one; train it with train.drafter or name its folder"
      )
    return model.drafter

  def start(
      self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array
  ) -> TreeState:
    """State with cell 0 sampled from the prefill and a tree below it."""
    grid = ctx.model.grid
    tree = self._tree(ctx.model)
    steps = jnp.zeros(tree.depth + 1, jnp.int32)
    token = sampling.sample(p_V[None], ctx.token_noise(jnp.zeros(1, int)))[0]
    walk = Walk(steps.at[0].set(token), steps, jnp.int32(1))
    forced = jnp.asarray(grid.forced_tokens(ctx.model.vocab))
    cache = self._drafter(ctx.model).cache(hidden_GD.shape[0], tree.scratch)
    return self._advance(
        ctx, jnp.maximum(forced, 0), jnp.asarray(grid.is_forced),
        jnp.int32(-1), cache, walk, hidden_GD[:, None],
    )

  def propose(self, ctx: Context, state: TreeState) -> Queries:
    """The root and the nodes of the tree."""
    length, draft = ctx.model.grid.length, state.draft
    nodes = len(draft.tokens)
    root, places = state.next[None], state.next + draft.depth
    own = jnp.where(draft.exists, length + jnp.arange(nodes), length + nodes)
    committed = jnp.broadcast_to(
        jnp.arange(length) <= state.next, (nodes + 1, length))
    below = jnp.pad(draft.visible, ((1, 0), (0, 0)))
    return Queries(
        jnp.concatenate([state.tokens[root], draft.tokens]),
        jnp.concatenate([root, jnp.minimum(places, length - 1)]),
        jnp.concatenate([root, own]),
        jnp.concatenate([committed, below], axis=-1),
    )

  def resolve(
      self, ctx: Context, state: TreeState, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> TreeState:
    """State with the accepted path final and a new tree below its end."""
    del queries
    own_QD = hidden_GQD[0, :, :self._drafter(ctx.model).width]
    walk = self._walk(ctx, state, p_QV, own_QD)
    return self._advance(
        ctx, state.tokens, state.final, state.next, state.cache, walk,
        hidden_GQD,
    )

  def settle(
      self, ctx: Context, state: TreeState
  ) -> tuple[jax.Array, jax.Array]:
    """Where the accepted nodes were written, and the slots they became."""
    del ctx
    return state.source, state.target

  def _tree(self, model: Model) -> tree_shapes.Tree:
    return tree_shapes.fit(self.tree, model.grid.length, model.vocab)

  def _advance(
      self, ctx, tokens_N, final_N, root, cache, walk: Walk, hidden_GQD
  ) -> TreeState:
    """State after a walk from the slot `root`."""
    length, tree = ctx.model.grid.length, self._tree(ctx.model)
    steps = jnp.arange(tree.depth + 1)
    is_taken, slots = steps < walk.count, root + 1 + steps
    to = jnp.where(is_taken, slots, length)
    tokens_N = tokens_N.at[to].set(walk.tokens, mode="drop")
    final_N = final_N.at[to].set(True, mode="drop")
    # The drafter reads what became final, with the states that predicted it.
    hidden_GQD, cache = ctx.model.drafter.forward(
        ctx.params, cache, hidden_GQD[:, walk.queries],
        Queries(
            walk.tokens, jnp.minimum(slots, length - 1),
            jnp.where(is_taken, slots, length + tree.scratch),
            jnp.arange(length + tree.scratch)
            <= jnp.minimum(slots, length - 1)[:, None],
        ),
    )
    root = root + walk.count
    draft = growth.grow(
        ctx, tree, self.drafts,
        Roots(root, hidden_GQD[:, walk.count - 1], cache),
    )
    nowhere = length + tree.nodes
    return TreeState(
        tokens_N, final_N, root, draft, cache,
        jnp.where(is_taken, length + walk.queries - 1, 0)[1:],
        jnp.where(is_taken, slots - 1, nowhere)[1:],
    )

  def _walk(
      self, ctx: Context, state: TreeState, p_QV: jax.Array,
      hidden_QD: jax.Array,
  ) -> Walk:
    """The path from the root to the first token that is not drafted."""
    grid, tree = ctx.model.grid, self._tree(ctx.model)
    u_SK = jax.random.uniform(
        ctx.pass_key(_TEST_PURPOSE), (tree.depth + 1, tree.width))

    def step(carry, inputs):
      query, is_open = carry
      slot, u_K = inputs
      is_open &= slot < grid.length
      is_forced = jnp.asarray(grid.is_forced)[
          jnp.minimum(slot, grid.length - 1)]
      family = _family(state.draft, query, tree.width, hidden_QD)
      token, child = self._decide(ctx, p_QV[query], family, slot, u_K)
      token = jnp.where(is_forced, ctx.model.vocab, token)
      child = jnp.where(is_forced, 0, child)
      # Beyond the last sibling, or one that does not exist: not drafted.
      is_drafted = family.exists.at[child].get(mode="fill", fill_value=False)
      below = family.queries[jnp.minimum(child, tree.width - 1)]
      return (below, is_open & is_drafted), (token, query, is_open)

    slots = state.next + 1 + jnp.arange(tree.depth + 1)
    _, (tokens, queries, is_open) = jax.lax.scan(
        step, (jnp.int32(0), True), (slots, u_SK))
    return Walk(tokens, queries, jnp.sum(is_open, dtype=jnp.int32))

  def _decide(self, ctx, p_V, family: Family, slot, u_K):
    """(token of a slot, index of the child that holds it or K)."""
    if family.q is None:
      p_V = self._relax(ctx, p_V, family)
      token = sampling.sample(p_V[None], ctx.token_noise(slot[None]))[0]
      same_K = family.exists & (family.tokens == token)
      return token, jnp.where(jnp.any(same_K), jnp.argmax(same_K), len(same_K))
    p_V, child = self._test(ctx, p_V, family, u_K)
    # One draw per pass suffices: only the walk's last step uses it.
    drawn = sampling.sample_inverse(p_V[None], ctx.pass_key(_DRAW_PURPOSE))[0]
    drafted = family.tokens.at[child].get(mode="fill", fill_value=0)
    return jnp.where(child < len(u_K), drafted, drawn), child

  def _relax(self, ctx, p_V, family: Family) -> jax.Array:
    """The target with mass moved onto the children, the best child first."""
    if self.lossless:
      return p_V

    def move(k, carry):
      p_V, left_V = carry
      taken_V = self._masked(ctx, left_V, family, k)
      token = family.tokens[k]
      p_V = (p_V - taken_V).at[token].add(jnp.sum(taken_V))
      clear = jnp.where(family.exists[k], 0.0, left_V[token])
      return p_V, (left_V - taken_V).at[token].set(clear)

    return jax.lax.fori_loop(0, len(family.tokens), move, (p_V, p_V))[0]

  def _test(self, ctx, p_V, family: Family, u_K):
    """(what is left of the target, index of the child that passed or K)."""
    count = len(u_K)

    def test(k, carry):
      p_V, q_V, child = carry
      token = family.tokens[k]
      if not self.lossless:
        taken_V = self._masked(ctx, p_V, family, k)
        p_V = (p_V - taken_V).at[token].add(jnp.sum(taken_V))
      is_tested = family.exists[k] & (child == count) & (q_V[token] > 0)
      passes = is_tested & (u_K[k] * q_V[token] < p_V[token])
      fails = is_tested & ~passes
      p_V = jnp.where(fails, _normal(sampling.residual(p_V, q_V)), p_V)
      q_V = jnp.where(fails, _normal(q_V.at[token].set(0.0)), q_V)
      return p_V, q_V, jnp.where(passes, k, child)

    p_V, _, child = jax.lax.fori_loop(
        0, count, test, (p_V, family.q, jnp.int32(count)))
    return p_V, child

  def _masked(self, ctx, p_V, family: Family, k) -> jax.Array:
    """`taken`, nothing where the child does not exist or is impossible."""
    token = family.tokens[k]
    is_able = family.exists[k] & (p_V[token] > 0)
    taken_V = self.taken(ctx, p_V, family, k).at[token].set(0.0)
    return jnp.where(is_able, taken_V, 0.0)


def _family(
    draft: Draft, query: jax.Array, width: int, hidden_QD: jax.Array
) -> Family:
  """The children of a query, in the drafter's order."""
  nodes = len(draft.tokens)
  is_child = draft.exists & (draft.parent == query)
  (child_K,) = jnp.nonzero(is_child, size=width, fill_value=nodes)
  exists_K = child_K < nodes
  child_K = jnp.minimum(child_K, nodes - 1)
  return Family(
      child_K + 1, draft.tokens[child_K], exists_K, hidden_QD[child_K + 1],
      hidden_QD[query], None if draft.q is None else draft.q[query],
  )


def _normal(p_V: jax.Array) -> jax.Array:
  """Probabilities of masses; zeros stay zeros."""
  return p_V / jnp.maximum(jnp.sum(p_V), jnp.finfo(p_V.dtype).tiny)
