"""Inputs of the verification of a draft tree, and the pairs that it scores."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.types import AugmentedState, TreeArrays

LOCAL, EARLIER = 1, 2


class VerifyProblem(NamedTuple):
    """Inputs of every implementation.

    Attributes:
        queries: `[B, N, H, D]` of the nodes.
        keys: `[B, N, K, D]`.
        values: `[B, N, K, E]`.
        alpha: `[H]` factor of the grouped branch, None to leave it out.
        taps: `[H, W]` convolution filter, lag 0 first, None to leave it out.
        tree: the tree.
        state: the state, which is not touched.
    """

    queries: Float[Array, "B N H D"]
    keys: Float[Array, "B N K D"]
    values: Float[Array, "B N K E"]
    alpha: Float[Array, " H"] | None
    taps: Float[Array, "H W"] | None
    tree: TreeArrays
    state: AugmentedState


def branches(problem: VerifyProblem) -> Int[Array, "B N M"]:
    """The branch of each pair of a node and a slot of the unfinished group or a node: LOCAL, EARLIER or none (0)."""
    state, tree = problem.state, problem.tree
    batch, nodes = problem.queries.shape[:2]
    size = state.keys.shape[1]
    slots = (state.position // size * size)[:, None] + jnp.arange(size)
    positions = state.position[:, None] + jnp.broadcast_to(tree.depth, (batch, nodes))
    filled = jnp.broadcast_to((slots < state.position[:, None])[:, None], (batch, nodes, size))
    above = jnp.broadcast_to(tree.ancestors, (batch, nodes, nodes))
    met = jnp.concatenate([filled, above], axis=2)
    keys = jnp.concatenate([slots, positions], axis=1)
    same = keys[:, None] // size == positions[:, :, None] // size
    return jnp.where(met, jnp.where(same, LOCAL, EARLIER), 0).astype(jnp.int32)


def convolution_matrices(
    taps: Float[Array, "H W"], tree: TreeArrays
) -> tuple[Float[Array, "*#B H N W_1"], Float[Array, "*#B H N N"]]:
    """The convolution as matrices over the saved window and over the nodes."""
    width = taps.shape[1]

    def at(lag: Array) -> Array:
        found = jnp.moveaxis(taps[:, jnp.clip(lag, 0, width - 1)], 0, -3)
        return jnp.where(((lag >= 0) & (lag < width))[..., None, :, :], found, 0)

    into_window = tree.depth[..., :, None] + width - 1 - jnp.arange(width - 1)
    apart = jnp.where(tree.ancestors, tree.depth[..., :, None] - tree.depth[..., None, :], -1)
    return at(into_window), at(apart)
