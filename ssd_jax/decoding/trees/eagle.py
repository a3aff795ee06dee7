"""Draft trees: a drafter proposes several continuations, one pass verifies all.

A pass feeds the last final slot (the root) and T nodes below it; each node sees
the final slots and its own ancestors. Starting at the root, verification
decides one token per slot; as long as this token is one of the drafted
children, it continues below that child. So every pass commits one token, and
one more for each accepted node. There are two exact rules:

  Deterministic drafts (top, coupled): the token is sampled from the target with
  its slot's own noise, as in AR; the output equals AR's, token for token.

  Sampled drafts: each child in turn is accepted with probability min(1, p / q);
  otherwise p becomes the residual max(0, p - q) and the child is removed from
  q. (The rule of EAGLE and SpecInfer; the noise of tests and of resampling is
  fresh in each pass.)

A relaxed decoder first transfers mass of the target to drafts, see `relaxed`.
Everything else follows from the modified target, so if no mass is transferred,
a relaxed decoder equals Eagle, token for token.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from ssd_jax.core.config import UserError, check
from ssd_jax.core.protocols import DecoderBase, Needs
from ssd_jax.core.types import Drafter, KVCache, Model, Queries
from ssd_jax.decoding import sampling
from ssd_jax.decoding.engine import Context
from ssd_jax.decoding.trees import growth, shapes as tree_shapes
from ssd_jax.decoding.trees.growth import DRAFTS, Draft, Roots

_TEST_PURPOSE, _RESAMPLE_PURPOSE = 1, 2


class TreeState(flax.struct.PyTreeNode):
  """Decoding state of one image.

  Attributes:
    tokens: int32 [N], final tokens.
    final: bool [N], which slots are final.
    next: int32 [], the root: the last slot of the final prefix, not yet fed.
    draft: The tree below the root.
    cache: The drafter's keys and values of the sequence, up to the root.
    source: int32 [D], scratch slots of the nodes accepted in the last pass.
    target: int32 [D], the slots that these nodes occupy; X is none.
  """

  tokens: jax.Array
  final: jax.Array
  next: jax.Array
  draft: Draft
  cache: KVCache
  source: jax.Array
  target: jax.Array


@flax.struct.dataclass
class Siblings:
  """The K children of a node; nonexistent ones come last.

  Attributes:
    queries: int32 [K], their queries.
    tokens: int32 [K], their tokens.
    exists: bool [K], which of them exist.
    hidden: [K, D], their hidden states in the conditional stream.
    parent: [D], hidden state of the node itself.
    q: float32 [V], distribution that they were sampled from, or None.
  """

  queries: jax.Array
  tokens: jax.Array
  exists: jax.Array
  hidden: jax.Array
  parent: jax.Array
  q: jax.Array | None


@flax.struct.dataclass
class Walk:
  """The path that a pass accepted: D + 1 steps, of which `count` are valid.

  Attributes:
    tokens: int32 [D + 1], tokens of the slots after the root.
    queries: int32 [D + 1], the node that each step started from.
    count: int32 [], number of tokens decided.
  """

  tokens: jax.Array
  queries: jax.Array
  count: jax.Array


@dataclasses.dataclass(frozen=True)
class Eagle(DecoderBase):
  """Exact verification of a draft tree.

  Attributes:
    tree: Name of the tree's shape, see `shapes`.
    drafts: How children are selected, see `growth`.

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
        "top, unless tree is static: a dynamic tree selects nodes by their "
        "tokens and would bias sampled ones",
    )

  def _refuse_coupled(self) -> None:
    """Raises UserError if a relaxed decoder uses coupled drafts.

    A draft selected with the noise that samples the token gains far more from a
    little mass than an independent draft would: no bound would hold.
    """
    check(self.lossless or self.drafts != "coupled", "drafts", "'coupled'",
          f"top or sampled if {self.name} is relaxed")

  @property
  def lossless(self) -> bool:
    """Whether verification is exact; relaxed subclasses override this."""
    return True

  def transferred_mass(
      self, ctx: Context, p_V: jax.Array, siblings: Siblings, child: jax.Array
  ) -> jax.Array:
    """Returns the mass that a child takes from other tokens, float32 [V].

    It is not called if the decoder is lossless.

    Args:
      ctx: Context of the pass.
      p_V: What is left of the target after the better siblings were rejected.
      siblings: The child and its siblings.
      child: int32 [], index of the child among the siblings.
    """
    del ctx, siblings, child
    return jnp.zeros_like(p_V)

  def needs(self, model: Model) -> Needs:
    """Returns the drafter, which grows the tree."""
    return Needs(drafter=True)

  def scratch(self, model: Model) -> int:
    """Returns the number of nodes of the tree."""
    self._drafter(model)
    return self._tree(model).nodes

  def _drafter(self, model: Model) -> Drafter:
    if model.drafter is None:
      raise UserError(
          f"Expected a model with a drafter for decoder {self.name}, got a "
          "model without a drafter. Train one with train.drafter or pass its "
          "folder."
      )
    return model.drafter

  def start(
      self, ctx: Context, p_V: jax.Array, hidden_GD: jax.Array
  ) -> TreeState:
    """Returns the state with token 0 sampled from the prefill and a tree."""
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
    """Returns the root and the nodes of the tree."""
    length, draft = ctx.model.grid.length, state.draft
    nodes = len(draft.tokens)
    root, positions = state.next[None], state.next + draft.depth
    own = jnp.where(draft.exists, length + jnp.arange(nodes), length + nodes)
    committed = jnp.broadcast_to(
        jnp.arange(length) <= state.next, (nodes + 1, length))
    below = jnp.pad(draft.visible, ((1, 0), (0, 0)))
    return Queries(
        jnp.concatenate([state.tokens[root], draft.tokens]),
        jnp.concatenate([root, jnp.minimum(positions, length - 1)]),
        jnp.concatenate([root, own]),
        jnp.concatenate([committed, below], axis=-1),
    )

  def resolve(
      self, ctx: Context, state: TreeState, queries: Queries, p_QV: jax.Array,
      hidden_GQD: jax.Array,
  ) -> TreeState:
    """Commits the accepted path and grows a new tree below its end."""
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
    """Returns the state after a walk from the slot `root`."""
    length, tree = ctx.model.grid.length, self._tree(ctx.model)
    steps = jnp.arange(tree.depth + 1)
    is_taken, slots = steps < walk.count, root + 1 + steps
    to = jnp.where(is_taken, slots, length)
    tokens_N = tokens_N.at[to].set(walk.tokens, mode="drop")
    final_N = final_N.at[to].set(True, mode="drop")
    # Feeds the drafter the new final tokens and the states that predicted them.
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
    """Returns the path from the root to the first token that is not drafted."""
    grid, tree = ctx.model.grid, self._tree(ctx.model)
    u_SK = jax.random.uniform(
        ctx.pass_key(_TEST_PURPOSE), (tree.depth + 1, tree.width))

    def step(carry, inputs):
      query, is_open = carry
      slot, u_K = inputs
      is_open &= slot < grid.length
      is_forced = jnp.asarray(grid.is_forced)[
          jnp.minimum(slot, grid.length - 1)]
      siblings = _siblings(state.draft, query, tree.width, hidden_QD)
      token, child = self._decide(ctx, p_QV[query], siblings, slot, u_K)
      token = jnp.where(is_forced, ctx.model.vocab, token)
      child = jnp.where(is_forced, 0, child)
      # An index beyond the last sibling means that the token is not drafted.
      is_drafted = siblings.exists.at[child].get(mode="fill", fill_value=False)
      below = siblings.queries[jnp.minimum(child, tree.width - 1)]
      return (below, is_open & is_drafted), (token, query, is_open)

    slots = state.next + 1 + jnp.arange(tree.depth + 1)
    _, (tokens, queries, is_open) = jax.lax.scan(
        step, (jnp.int32(0), True), (slots, u_SK))
    return Walk(tokens, queries, jnp.sum(is_open, dtype=jnp.int32))

  def _decide(self, ctx, p_V, siblings: Siblings, slot, u_K):
    """Returns the token of a slot and the index of its child, K if none."""
    if siblings.q is None:
      p_V = self._relax(ctx, p_V, siblings)
      token = sampling.sample(p_V[None], ctx.token_noise(slot[None]))[0]
      same_K = siblings.exists & (siblings.tokens == token)
      return token, jnp.where(jnp.any(same_K), jnp.argmax(same_K), len(same_K))
    p_V, child = self._test(ctx, p_V, siblings, u_K)
    # All steps may share the noise: only the walk's last step resamples.
    resampled = sampling.sample_inverse(
        p_V[None], ctx.pass_key(_RESAMPLE_PURPOSE))[0]
    drafted = siblings.tokens.at[child].get(mode="fill", fill_value=0)
    return jnp.where(child < len(u_K), drafted, resampled), child

  def _relax(self, ctx, p_V, siblings: Siblings) -> jax.Array:
    """Transfers mass of the target to the children, the best child first."""
    if self.lossless:
      return p_V

    def move(k, carry):
      p_V, left_V = carry
      mass_V = self._valid_mass(ctx, left_V, siblings, k)
      token = siblings.tokens[k]
      p_V = (p_V - mass_V).at[token].add(jnp.sum(mass_V))
      clear = jnp.where(siblings.exists[k], 0.0, left_V[token])
      return p_V, (left_V - mass_V).at[token].set(clear)

    return jax.lax.fori_loop(0, len(siblings.tokens), move, (p_V, p_V))[0]

  def _test(self, ctx, p_V, siblings: Siblings, u_K):
    """Tests the children in turn.

    Returns:
      What is left of the target, float32 [V], and the index of the accepted
      child, K if none.
    """
    count = len(u_K)

    def test(k, carry):
      p_V, q_V, child = carry
      token = siblings.tokens[k]
      if not self.lossless:
        mass_V = self._valid_mass(ctx, p_V, siblings, k)
        p_V = (p_V - mass_V).at[token].add(jnp.sum(mass_V))
      is_tested = siblings.exists[k] & (child == count) & (q_V[token] > 0)
      is_accepted = is_tested & (u_K[k] * q_V[token] < p_V[token])
      is_rejected = is_tested & ~is_accepted
      p_V = jnp.where(is_rejected, _normalize(sampling.residual(p_V, q_V)), p_V)
      q_V = jnp.where(is_rejected, _normalize(q_V.at[token].set(0.0)), q_V)
      return p_V, q_V, jnp.where(is_accepted, k, child)

    p_V, _, child = jax.lax.fori_loop(
        0, count, test, (p_V, siblings.q, jnp.int32(count)))
    return p_V, child

  def _valid_mass(self, ctx, p_V, siblings: Siblings, k) -> jax.Array:
    """Returns `transferred_mass`, or zeros if the child cannot take any."""
    token = siblings.tokens[k]
    is_possible = siblings.exists[k] & (p_V[token] > 0)
    mass_V = self.transferred_mass(ctx, p_V, siblings, k).at[token].set(0.0)
    return jnp.where(is_possible, mass_V, 0.0)


def _siblings(
    draft: Draft, query: jax.Array, width: int, hidden_QD: jax.Array
) -> Siblings:
  """Returns the children of a query, in the drafter's order."""
  nodes = len(draft.tokens)
  is_child = draft.exists & (draft.parent == query)
  (child_K,) = jnp.nonzero(is_child, size=width, fill_value=nodes)
  exists_K = child_K < nodes
  child_K = jnp.minimum(child_K, nodes - 1)
  return Siblings(
      child_K + 1, draft.tokens[child_K], exists_K, hidden_QD[child_K + 1],
      hidden_QD[query], None if draft.q is None else draft.q[query],
  )


def _normalize(p_V: jax.Array) -> jax.Array:
  """Normalises masses to probabilities; all-zero masses stay zero."""
  return p_V / jnp.maximum(jnp.sum(p_V), jnp.finfo(p_V.dtype).tiny)
