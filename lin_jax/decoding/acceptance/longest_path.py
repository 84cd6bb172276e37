"""Longest accepted path of a draft tree: from the root down, as long as the target accepts every token."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lin_jax.decoding.drafting.api import Draft


class Accepted(NamedTuple):
    """Result of one verification.

    Attributes:
        path: `[B, P]` accepted nodes from the root on; past `length` the last one is repeated.
        length: `[B]` number of accepted nodes, the root included.
        emitted: `[B, P]` the accepted tokens, then one more, which the target chose after the last of them.
    """

    path: Int[Array, "B P"]
    length: Int[Array, " B"]
    emitted: Int[Array, "B P"]


def accept(draft: Draft, targets: Int[Array, "B N"], max_length: int) -> Accepted:
    """Longest path (the first of equals) of tokens that the target itself chose.

    A node is accepted if its parent is and its token is what the target chose after the parent. With greedy targets
    that is greedy decoding; with sampled targets whose keys depend on the position alone it is plain sampling.

    Args:
        draft: the tree.
        targets: `[B, N]` the target's choice after each node.
        max_length: largest possible number P of nodes on a path.
    """
    matches = draft.tokens == jnp.take_along_axis(targets, draft.parents, axis=1)
    return longest_path(draft, matches, targets, max_length)


def longest_path(draft: Draft, accepted: Bool[Array, "B N"], targets: Int[Array, "B N"], max_length: int) -> Accepted:
    """Longest path (the first of equals) of accepted nodes, and the target's choice after its end.

    Args:
        draft: the tree.
        accepted: `[B, N]` True where a node's token is accepted after its parent; the root always is.
        targets: `[B, N]` the target's choice after each node.
        max_length: largest possible number P of nodes on a path.
    """
    ancestors = jnp.broadcast_to(draft.tree.ancestors, (*accepted.shape, accepted.shape[1]))
    depth = jnp.broadcast_to(draft.tree.depth, accepted.shape)
    reached = jnp.all(accepted.at[:, 0].set(True)[:, None, :] | ~ancestors, axis=2)
    best = jnp.argmax(jnp.where(reached, depth + 1, 0), axis=1)[:, None]
    above = jnp.take_along_axis(ancestors, best[:, :, None], axis=1)[:, 0]
    length = jnp.take_along_axis(depth, best, axis=1)[:, 0] + 1
    order = jnp.arange(max_length)
    path = jnp.argmax(above[:, None, :] & (depth[:, None, :] == order[:, None]), axis=2)
    path = jnp.where(order < length[:, None], path, best)
    drafted = jnp.take_along_axis(draft.tokens, jnp.pad(path[:, 1:], ((0, 0), (0, 1))), axis=1)
    chosen = jnp.take_along_axis(targets, path, axis=1)
    return Accepted(path, length, jnp.where(order < length[:, None] - 1, drafted, chosen))
