"""What verifying a draft tree is computed from, and which pairs meet in it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOCAL, EARLIER = 1, 2


class Tree(NamedTuple):
    """The shape of a draft tree, the same for all rows or row by row; node 0 is the root, at depth 0.

    Attributes:
        depth: `[N]` or `[B, N]`.
        ancestors: `[N, N]` or `[B, N, N]`, whether node j is node i or above it.
    """

    depth: Int[Array, "*#B N"]
    ancestors: Bool[Array, "*#B N N"]


class Held(NamedTuple):
    """The state of `B` sequences.

    Attributes:
        memory: `[B, K, D, E]` `sum k v^T` over finished groups, float32 or better.
        keys: `[B, G, K, D]` of the unfinished group as they are scored, position p in slot `p % G`.
        values: `[B, G, K, E]`.
        window: `[B, W - 1, K, E]` the last values, newest last; None without a convolution.
        position: `[B]` tokens consumed so far.
    """

    memory: Float[Array, "B K D E"]
    keys: Float[Array, "B G K D"]
    values: Float[Array, "B G K E"]
    window: Float[Array, "B W_1 K E"] | None
    position: Int[Array, " B"]


class Problem(NamedTuple):
    """What every implementation reads.

    Attributes:
        queries: `[B, N, H, D]` of the nodes.
        keys: `[B, N, K, D]`.
        values: `[B, N, K, E]`.
        alpha: `[H]` factor of the grouped branch, None to leave it out.
        taps: `[H, W]` convolution filter, lag 0 first, None to leave it out.
        tree: the tree.
        held: the state, which is not touched.
    """

    queries: Float[Array, "B N H D"]
    keys: Float[Array, "B N K D"]
    values: Float[Array, "B N K E"]
    alpha: Float[Array, " H"] | None
    taps: Float[Array, "H W"] | None
    tree: Tree
    held: Held


def branches(problem: Problem) -> Int[Array, "B N M"]:
    """The branch of each pair of a node and a slot of the unfinished group or a node: LOCAL, EARLIER or none (0)."""
    held, tree = problem.held, problem.tree
    batch, nodes = problem.queries.shape[:2]
    size = held.keys.shape[1]
    slots = (held.position // size * size)[:, None] + jnp.arange(size)
    positions = held.position[:, None] + jnp.broadcast_to(tree.depth, (batch, nodes))
    filled = jnp.broadcast_to((slots < held.position[:, None])[:, None], (batch, nodes, size))
    above = jnp.broadcast_to(tree.ancestors, (batch, nodes, nodes))
    met = jnp.concatenate([filled, above], axis=2)
    keys = jnp.concatenate([slots, positions], axis=1)
    same = keys[:, None] // size == positions[:, :, None] // size
    return jnp.where(met, jnp.where(same, LOCAL, EARLIER), 0).astype(jnp.int32)


def convolution_matrices(
    taps: Float[Array, "H W"], tree: Tree
) -> tuple[Float[Array, "*#B H N W_1"], Float[Array, "*#B H N N"]]:
    """The convolution as matrices over the saved window and over the nodes."""
    width = taps.shape[1]

    def at(lag: Array) -> Array:
        found = jnp.moveaxis(taps[:, jnp.clip(lag, 0, width - 1)], 0, -3)
        return jnp.where(((lag >= 0) & (lag < width))[..., None, :, :], found, 0)

    into_window = tree.depth[..., :, None] + width - 1 - jnp.arange(width - 1)
    apart = jnp.where(tree.ancestors, tree.depth[..., :, None] - tree.depth[..., None, :], -1)
    return at(into_window), at(apart)
