"""Which drafted tokens stand: the longest path on which every token is one that the target accepts."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lin_jax.decoding.draft import Draft


class Accepted(NamedTuple):
    """What one verification yields.

    Attributes:
        path: `[B, P]` nodes from the root on; past `length` the last one is repeated.
        length: `[B]` nodes that stand, the root included.
        emitted: `[B, P]` the accepted tokens, then one more, which the target chose after the last of them.
    """

    path: Int[Array, "B P"]
    length: Int[Array, " B"]
    emitted: Int[Array, "B P"]


def accept(draft: Draft, targets: Int[Array, "B N"], longest: int) -> Accepted:
    """The longest path (the first of equals) of tokens that the target itself chose.

    A node stands if its parent does and its token is what the target chose after the parent. With greedy targets that
    is greedy decoding; with sampled targets whose keys depend on the position alone it is plain sampling.

    Args:
        draft: the tree.
        targets: `[B, N]` what the target chose after each node.
        longest: nodes P of the longest path that there may be.
    """
    stands = draft.tokens == jnp.take_along_axis(targets, draft.parents, axis=1)
    return longest_path(draft, stands, targets, longest)


def longest_path(draft: Draft, stands: Bool[Array, "B N"], targets: Int[Array, "B N"], longest: int) -> Accepted:
    """The longest path (the first of equals) of nodes that stand, and the target's choice after its end.

    Args:
        draft: the tree.
        stands: `[B, N]` whether each node's token is accepted after its parent; the root is.
        targets: `[B, N]` what the target chose after each node.
        longest: nodes P of the longest path that there may be.
    """
    ancestors = jnp.broadcast_to(draft.tree.ancestors, (*stands.shape, stands.shape[1]))
    depth = jnp.broadcast_to(draft.tree.depth, stands.shape)
    reached = jnp.all(stands.at[:, 0].set(True)[:, None, :] | ~ancestors, axis=2)
    best = jnp.argmax(jnp.where(reached, depth + 1, 0), axis=1)[:, None]
    above = jnp.take_along_axis(ancestors, best[:, :, None], axis=1)[:, 0]
    length = jnp.take_along_axis(depth, best, axis=1)[:, 0] + 1
    order = jnp.arange(longest)
    path = jnp.argmax(above[:, None, :] & (depth[:, None, :] == order[:, None]), axis=2)
    path = jnp.where(order < length[:, None], path, best)
    drafted = jnp.take_along_axis(draft.tokens, jnp.pad(path[:, 1:], ((0, 0), (0, 1))), axis=1)
    chosen = jnp.take_along_axis(targets, path, axis=1)
    return Accepted(path, length, jnp.where(order < length[:, None] - 1, drafted, chosen))
