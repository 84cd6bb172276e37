"""Inputs of the verification of a draft tree by a window and a memory, and the pairs that it scores."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.types import TreeArrays, WindowedState
from pallas_kernels.windowed_attention.problem import AttentionWindowPlan, FeatureWeights

NEAR, FAR = 1, 2


class WindowVerifyProblem(NamedTuple):
    """Inputs of every implementation.

    Attributes:
        queries: `[B, N, H, D]` of the nodes.
        keys: `[B, N, K, D]`.
        values: `[B, N, K, E]`.
        weights: the feature map's, in the type of the rows or in float32; with `exponential` they have biases.
        balance: `[H]` logarithm of the memory's factor, float32 or better.
        log_decays: `[B, N, K]` logarithms of each node's decay; None without decay.
        tree: the tree.
        state: the state, which is not touched.
    """

    queries: Float[Array, "B N H D"]
    keys: Float[Array, "B N K D"]
    values: Float[Array, "B N K E"]
    weights: FeatureWeights
    balance: Float[Array, " H"]
    log_decays: Float[Array, "B N K"] | None
    tree: TreeArrays
    state: WindowedState

    @property
    def features(self) -> int:
        """Features M of a key: the rows of the memory."""
        return self.state.memory.shape[2]

    @property
    def sinks(self) -> int:
        """Sinks S that the state keeps."""
        return 0 if self.state.sink_keys is None else self.state.sink_keys.shape[1]

    def sinks_and_nodes(self) -> tuple[Float[Array, "B S_N K D"], Float[Array, "B S_N K E"]]:
        """Keys and values of the sinks, if there are any, and then of the nodes: what lies behind the ring."""
        if self.state.sink_keys is None or self.state.sink_values is None:
            return self.keys, self.values
        return (
            jnp.concatenate([self.state.sink_keys.astype(self.keys.dtype), self.keys], axis=1),
            jnp.concatenate([self.state.sink_values.astype(self.values.dtype), self.values], axis=1),
        )

    @property
    def ancestors(self) -> Bool[Array, "B N N"]:
        """Mask of the nodes j that are node i or above it, at `[i, j]`, for every row."""
        batch, nodes = self.queries.shape[:2]
        return jnp.broadcast_to(self.tree.ancestors, (batch, nodes, nodes))


class Slots(NamedTuple):
    """Slots of a window's ring: positions `[B, C]` of their tokens, and the mask `[B, C]` of those in use."""

    positions: Int[Array, "B C"]
    mask: Bool[Array, "B C"]


def ring_slots(position: Int[Array, " B"], start: Int[Array, " B"], size: int) -> Slots:
    """The slots in use.

    Args:
        position: tokens consumed.
        start: the position at which the next query's window begins.
        size: slots C; position p is in slot `p % C`.
    """
    last = position[:, None] - 1
    positions = last - (last - jnp.arange(size)) % max(size, 1)
    return Slots(positions, positions >= jnp.maximum(start, 0)[:, None])


class TreeAges(NamedTuple):
    """Sums of the logarithms of decay.

    Attributes:
        path: `[B, N, K]` from the first token after the state to each node, itself included.
        since: `[B, C, K]` of the tokens after each slot's.
        elapsed: `[B, 1, K]` of all tokens of the window: those since the memory was decayed.
    """

    path: Float[Array, "B N K"]
    since: Float[Array, "B C K"]
    elapsed: Float[Array, "B 1 K"]


def tree_ages(
    slots: Slots, held: Float[Array, "B C K"], nodes: Float[Array, "B N K"], ancestors: Bool[Array, "B N N"]
) -> TreeAges:
    """Ages of a tree's nodes, given the decays of the ring and of the nodes."""
    path = jnp.einsum("bnm,bmk->bnk", ancestors.astype(nodes.dtype), nodes)
    later = slots.mask[:, None] & (slots.positions[:, None] > slots.positions[:, :, None])
    since = jnp.einsum("bcd,bdk->bck", later.astype(held.dtype), held)
    elapsed = jnp.sum(jnp.where(slots.mask[..., None], held, 0), axis=1, keepdims=True)
    return TreeAges(path, since, elapsed)


def node_pairs(problem: WindowVerifyProblem, window: AttentionWindowPlan) -> Int[Array, "B N M"]:
    """The kind of each pair of a node and a slot of the ring, a sink, or a node above: NEAR, FAR or none (0)."""
    slots, sinks = _slots(problem, window), jnp.arange(problem.sinks)
    batch, nodes = problem.queries.shape[:2]
    positions = problem.state.position[:, None] + jnp.broadcast_to(problem.tree.depth, (batch, nodes))
    known = jnp.concatenate([slots.mask, sinks < problem.state.position[:, None]], axis=1)
    known = jnp.broadcast_to(known[:, None], (batch, nodes, known.shape[1]))
    met = jnp.concatenate([known, problem.ancestors], axis=2)
    order = jnp.broadcast_to(sinks, (batch, problem.sinks))
    keys = jnp.concatenate([slots.positions, order, positions], axis=1)[:, None]
    near = (keys >= window.start(positions)[:, :, None]) | (keys < problem.sinks)
    return jnp.where(met, jnp.where(near, NEAR, FAR), 0).astype(jnp.int32)


def pair_clock(problem: WindowVerifyProblem, window: AttentionWindowPlan) -> Float[Array, "B K M"] | None:
    """Sums of the logarithms of decay, from the memory's last token to each slot's and each node; None without decay.

    The decay of a pair is the exponential of the difference, and that of the memory the exponential of a node's sum.
    Sinks, which do not decay, have zeros.
    """
    held = problem.state.decays
    if held is None or problem.log_decays is None:
        return None
    ages = tree_ages(_slots(problem, window), held, problem.log_decays, problem.ancestors)
    since = jnp.pad(ages.elapsed - ages.since, ((0, 0), (0, problem.sinks), (0, 0)))
    return jnp.swapaxes(jnp.concatenate([since, ages.elapsed + ages.path], axis=1), 1, 2)


def _slots(problem: WindowVerifyProblem, window: AttentionWindowPlan) -> Slots:
    """The ring's slots in use; sinks are in slots of their own."""
    position = problem.state.position
    return ring_slots(position, jnp.maximum(window.start(position), problem.sinks), problem.state.keys.shape[1])
