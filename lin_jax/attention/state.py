"""Reads and updates of the state of augmented linear attention: a tree's pairs, and the state after whole rows."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.attention.layout import Layout
from lin_jax.attention.pairs import PairMasks, causal_masks
from pallas_kernels.chunks import first_segment_id
from pallas_kernels.types import AugmentedState as AugmentedState
from pallas_kernels.types import Nodes, TreeArrays


class TreePairs(NamedTuple):
    """The pairs that a tree's nodes score on top of a state: with the unfinished group's tokens, and with each other.

    Attributes:
        positions: `[B, N]` of the nodes.
        key_positions: `[B, G + N]` of the unfinished group's slots and of the nodes.
        masks: of the pairs, one for each branch.
        keys: `[B, G + N, K, D]`.
        values: `[B, G + N, K, E]`.
    """

    positions: Int[Array, "B N"]
    key_positions: Int[Array, "B M"]
    masks: PairMasks
    keys: Float[Array, "B M K D"]
    values: Float[Array, "B M K E"]

    @classmethod
    def of(cls, state: AugmentedState, nodes: Nodes, tree: TreeArrays) -> "TreePairs":
        """The pairs of a tree whose nodes have the given keys and values."""
        size = state.keys.shape[1]
        slots = (state.position // size * size)[:, None] + jnp.arange(size)
        positions = state.position[:, None] + tree.depth
        held = jnp.broadcast_to((slots < state.position[:, None])[:, None], (*positions.shape, size))
        ancestors = jnp.broadcast_to(tree.ancestors, (*positions.shape, tree.ancestors.shape[-1]))
        key_positions = jnp.concatenate([slots, positions], axis=1)
        masks = causal_masks(positions, key_positions, size, jnp.concatenate([held, ancestors], axis=2))
        keys = jnp.concatenate([state.keys.astype(nodes.keys.dtype), nodes.keys], axis=1)
        values = jnp.concatenate([state.values.astype(nodes.values.dtype), nodes.values], axis=1)
        return cls(positions, key_positions, masks, keys, values)


def advance(state: AugmentedState, keys: Array, values: Array, layout: Layout, memory: Array | None) -> AugmentedState:
    """The state after whole rows: `memory` as given, the unfinished group and the window gathered from the rows."""
    size = state.keys.shape[1]
    valid = layout.valid
    index = jnp.arange(keys.shape[1])
    last_index = jnp.max(jnp.where(valid, index, -1), axis=1)
    last = jnp.take_along_axis(layout.segment_ids, jnp.maximum(last_index, 0)[:, None], axis=1)
    count = jnp.sum(valid & (layout.segment_ids == last), axis=1)
    continues = (last[:, 0] == first_segment_id(layout.segment_ids)) | (last_index < 0)
    position = (jnp.where(continues, state.position, 0) + count).astype(state.position.dtype)
    end = last_index + 1

    def gather(old: Array, new: Array, distance: Array, old_index: Array) -> Array:
        """Tokens `distance` before the end: from the rows where they reach that far, else from `old`."""
        extended = jnp.concatenate([old, new.astype(old.dtype)], axis=1)
        in_row = distance <= count[:, None]
        from_row = old.shape[1] + end[:, None] - distance
        index = jnp.where(in_row, from_row, old_index)
        found = jnp.take_along_axis(extended, jnp.clip(index, 0, extended.shape[1] - 1)[:, :, None, None], axis=1)
        known = in_row | (continues[:, None] & (old_index >= 0))
        return jnp.where(known[:, :, None, None], found, 0)

    slot = jnp.arange(size)
    in_group = slot < (position % size)[:, None]
    distance = jnp.where(in_group, (position % size)[:, None] - slot, count[:, None] + 1)
    old_slot = jnp.broadcast_to(slot, distance.shape)
    window = state.window
    if window is not None:
        width = window.shape[1]
        back = jnp.broadcast_to(jnp.arange(width, 0, -1), (keys.shape[0], width))
        window = gather(window, values, back, width - (back - count[:, None]))
    return AugmentedState(
        memory,
        gather(state.keys, keys, distance, old_slot),
        gather(state.values, values, distance, old_slot),
        window,
        position,
    )
