"""Dynamic draft trees: shaped anew at every step, row by row, by the drafter's own probabilities.

As in EAGLE-2 (Li et al. 2024): the tree is grown from the `beam` likeliest nodes of each depth; of all candidates the
likeliest are kept. A node is never likelier than its parent, so the kept nodes form a tree. All shapes are static.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.attention import TreeArrays, gather_nodes
from lin_jax.decoding.drafting.api import Draft, DraftContext, Drafter, Drawing, TreeLevel
from lin_jax.errors import UserError

# A step verifies all nodes: far fewer than this pay on any machine.
MAX_NODES, MAX_CANDIDATES = 1024, 2**14


@dataclass(frozen=True)
class DynamicTree:
    """Tree of the `size` nodes, the root included, that a drafter finds likeliest.

    Attributes:
        size: number of nodes N.
        depth: largest depth.
        beam: number of nodes per depth that get children.
        width: largest number of children of a node.
    """

    size: int
    depth: int
    beam: int = 4
    width: int = 4

    def __post_init__(self) -> None:
        if min(self.size - 1, self.depth, self.beam, self.width) < 1:
            raise UserError(
                f"the dynamic tree has size {self.size}, depth {self.depth}, beam {self.beam}, width {self.width}; "
                "give a size of at least 2, and at least 1 of the others"
            )
        if self.depth >= MAX_NODES or self.max_size > MAX_CANDIDATES:
            raise UserError(
                f"a dynamic tree of depth {self.depth}, beam {self.beam} and width {self.width} has more than "
                f"{MAX_CANDIDATES} candidates; give smaller ones"
            )
        if self.size > self.max_size:
            raise UserError(
                f"a dynamic tree of depth {self.depth}, beam {self.beam} and width {self.width} has at most "
                f"{self.max_size} nodes, not {self.size}; give a smaller size"
            )

    @property
    def max_size(self) -> int:
        """Number of candidates, the root included."""
        found, grown = 1, 1
        for _ in range(self.depth):
            found += grown * self.width
            grown = min(self.beam, grown * self.width)
        return found

    def grow(self, drafter: Drafter, context: DraftContext, state: Any, drawing: Drawing | None = None) -> Draft:
        """Grows the likeliest nodes below the root; arguments as in `DraftTree.grow`."""
        assert drawing is None, "checked by the generator: which nodes are kept would depend on what was drawn"
        tokens, joint, parents = self.candidates(drafter, context, state)
        # The candidates come level by level: in their order, parents precede children.
        kept = jnp.sort(jax.lax.top_k(joint[:, 1:], self.size - 1)[1], axis=1) + 1
        kept = jnp.pad(kept, ((0, 0), (1, 0)))
        tokens, joint, parents = (jnp.take_along_axis(part, kept, axis=1) for part in (tokens, joint, parents))
        found = jnp.isfinite(joint).at[:, 0].set(True)
        place = jnp.sum(kept[:, None, :] < parents[:, :, None], axis=2)
        place = jnp.where(found, place, 0)
        return Draft(jnp.where(found, tokens, -1), place, ancestry(place, self.depth))

    def candidates(
        self, drafter: Drafter, context: DraftContext, state: Any
    ) -> tuple[Int[Array, "B M"], Float[Array, "B M"], Int[Array, "B M"]]:
        """Finds the M candidates, level by level, the root first: tokens, joint log-probabilities, and parents."""
        batch = context.root.shape[0]
        tokens = last = above = context.root[:, None]
        shared, carried = drafter.begin(context, state)
        joint = likely = jnp.zeros((batch, 1))
        parents = number = jnp.zeros((batch, 1), jnp.int32)
        tree = ancestry(parents, 0)
        for depth in range(self.depth):
            guesses, carried = drafter.expand(
                shared, carried, TreeLevel(last, depth, self.width, None, True, above, tree)
            )
            assert guesses.log_probs is not None, "asked for"
            found = (likely[:, :, None] + guesses.log_probs).reshape(batch, -1)
            children = guesses.tokens.reshape(batch, -1)
            begins = tokens.shape[1]
            tokens = jnp.concatenate([tokens, children], axis=1)
            joint = jnp.concatenate([joint, found], axis=1)
            parents = jnp.concatenate([parents, jnp.repeat(number, self.width, axis=1)], axis=1)
            if depth + 1 == self.depth:
                break
            likely, chosen = jax.lax.top_k(found, min(self.beam, found.shape[1]))
            slots = chosen // self.width
            carried = gather_nodes(carried, slots)
            tree = _with_level(tree, last.shape[1], slots)
            last = jnp.where(jnp.isfinite(likely), jnp.take_along_axis(children, chosen, axis=1), -1)
            number = chosen + begins
            above = jnp.concatenate([above, last], axis=1)
        return tokens, joint, parents


def ancestry(parents: Int[Array, "B N"], depth: int) -> TreeArrays:
    """Depths and ancestry of trees, row by row, from the parents (0 for the root), which precede their children."""
    itself = jnp.broadcast_to(jnp.eye(parents.shape[1], dtype=bool), (*parents.shape, parents.shape[1]))
    ancestors = itself
    for _ in range(depth):
        ancestors = itself | jnp.take_along_axis(ancestors, parents[:, :, None], axis=1)
    return TreeArrays(jnp.sum(ancestors, axis=2) - 1, ancestors)


def _with_level(tree: TreeArrays, last: int, slots: Int[Array, "B K"]) -> TreeArrays:
    """Tree with one more level, whose nodes are children of the given ones (`slots`) of its `last` last nodes."""
    batch, size = tree.ancestors.shape[:2]
    count = slots.shape[1]
    parents = slots + size - last
    above = jnp.take_along_axis(tree.ancestors, parents[:, :, None], axis=1)
    own = jnp.broadcast_to(jnp.eye(count, dtype=bool), (batch, count, count))
    lower = jnp.concatenate([above, own], axis=2)
    upper = jnp.pad(tree.ancestors, ((0, 0), (0, 0), (0, count)))
    ancestors = jnp.concatenate([upper, lower], axis=1)
    return TreeArrays(jnp.sum(ancestors, axis=2) - 1, ancestors)
