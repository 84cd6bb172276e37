"""The constant-size state of augmented linear attention, and how it moves on: by a path of nodes, or by whole rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.attention.layout import Layout, first_document
from lin_jax.attention.mixer import Nodes
from lin_jax.attention.pairs import PairMasks, causal_masks
from lin_jax.attention.tree import TreeArrays
from pallas_kernels.path_commit.xla import fold_finished, join, shift_window


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AugmentedState:
    """What `B` sequences leave behind, at a size that does not grow. Parts that the mixer lacks are None.

    Attributes:
        memory: `[B, K, M, E]` `sum phi(k) v^T` over finished groups (with the normaliser behind the values, if there is
            one), float32 or better.
        keys: `[B, G, K, D]` keys of the unfinished group, position p in slot `p % G`.
        values: `[B, G, K, E]` its values.
        window: `[B, W-1, K, E]` the last values, newest last.
        position: `[B]` tokens consumed so far.
    """

    memory: Float[Array, "*layers B K M E"] | None
    keys: Float[Array, "*layers B G K D"]
    values: Float[Array, "*layers B G K E"]
    window: Float[Array, "*layers B W_1 K E"] | None
    position: Int[Array, "*layers B"]


class TreePairs(NamedTuple):
    """The pairs that a tree's nodes score on top of a state: with the unfinished group's tokens, and with each other.

    Attributes:
        positions: `[B, N]` of the nodes.
        key_positions: `[B, G + N]` of the unfinished group's slots and of the nodes.
        masks: which pairs meet, and in which branch.
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


def commit_path(
    state: AugmentedState, path: Nodes, length: Int[Array, " B"], fold: Callable[[Array, Array], Array]
) -> AugmentedState:
    """The state after the first `length` (at most G) nodes of the path, row by row.

    A path is no longer than a group, so at most one group is finished; it is folded whole, by the same operation
    that plain decoding uses, so that both leave the same bits. `fold(keys, values)` is what a group adds to the memory.
    """
    buffer = state.keys, state.values
    joined = join(buffer, state.position, path, length)
    memory = state.memory
    if memory is not None:
        memory = fold_finished(memory, buffer, state.position, path, joined.finished, fold)
    window = None if state.window is None else shift_window(state.window, path.values, length)
    return AugmentedState(memory, *joined.buffer, window, joined.position)


def advance(state: AugmentedState, keys: Array, values: Array, layout: Layout, memory: Array | None) -> AugmentedState:
    """The state after whole rows: `memory` as given, the unfinished group and the window gathered from the rows."""
    size = state.keys.shape[1]
    valid = layout.valid
    index = jnp.arange(keys.shape[1])
    last_index = jnp.max(jnp.where(valid, index, -1), axis=1)
    last = jnp.take_along_axis(layout.documents, jnp.maximum(last_index, 0)[:, None], axis=1)
    count = jnp.sum(valid & (layout.documents == last), axis=1)
    continues = (last[:, 0] == first_document(layout.documents)) | (last_index < 0)
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
