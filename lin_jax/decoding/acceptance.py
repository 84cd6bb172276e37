"""Which drafted tokens stand: the longest path on which every token is the target's own choice."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from lin_jax.decoding.tree import DraftTree


class Accepted(NamedTuple):
    """What one verification yields.

    Attributes:
        path: `[B, P]` nodes from the root on; past `length` the last one is repeated.
        length: `[B]` nodes that stand, the root included.
        emitted: `[B, P]` the target's choice after each node of the path: the accepted tokens, then one more.
    """

    path: Int[Array, "B P"]
    length: Int[Array, " B"]
    emitted: Int[Array, "B P"]


def accept(tokens: Int[Array, "B N"], targets: Int[Array, "B N"], tree: DraftTree) -> Accepted:
    """The longest accepted path (the first of equals).

    A node stands if its parent does and its token is what the target chose after the parent. With greedy targets that
    is greedy decoding; with sampled targets whose keys depend on the position alone it is plain sampling.

    Args:
        tokens: `[B, N]` the tree's tokens, -1 where there is no guess.
        targets: `[B, N]` what the target chose after each node.
        tree: the tree's shape.
    """
    arrays = tree.arrays()
    parents = jnp.asarray((0, *tree.parents[1:]))
    matches = (tokens == targets[:, parents]).at[:, 0].set(True)
    stands = jnp.all(matches[:, None, :] | ~arrays.ancestors, axis=2)
    best = jnp.argmax(jnp.where(stands, arrays.depth + 1, 0), axis=1)
    path = tree.chains()[best]
    return Accepted(path, arrays.depth[best] + 1, jnp.take_along_axis(targets, path, axis=1))
