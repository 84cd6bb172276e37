"""The constant-size state of augmented linear attention, and how it moves on: by a path of nodes, or by whole rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.convolution import shift_window
from lin_jax.attention.layout import Layout, first_document
from lin_jax.attention.mixer import Nodes
from lin_jax.attention.pairs import PairMasks, causal_masks
from lin_jax.attention.tree import TreeArrays


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


class Joined(NamedTuple):
    """An unfinished group and a path that follows it, slot by slot.

    Attributes:
        buffer: the group in which the path ends; slots beyond its end hold anything.
        finished: `[B]` whether that is another group than the one in which it begins.
        position: `[B]` tokens consumed after the path.
    """

    buffer: Nodes
    finished: Bool[Array, " B"]
    position: Int[Array, " B"]


def join(state: AugmentedState, path: Nodes, length: Int[Array, " B"]) -> Joined:
    """The first `length` (at most G) nodes of a path behind the unfinished group, row by row."""
    size = state.keys.shape[1]
    position = state.position + length.astype(state.position.dtype)
    order = jnp.arange(path.keys.shape[1])
    slots = jnp.where(order < length[:, None], (state.position[:, None] + order) % size, size)
    finished = position // size > state.position // size
    return Joined(Nodes(*_written(state, path, slots)), finished, position)


def begun_group(state: AugmentedState, path: Nodes) -> Nodes:
    """The group in which a path begins, with as much of the path as fits in, row by row."""
    size = state.keys.shape[1]
    slots = (state.position % size)[:, None] + jnp.arange(path.keys.shape[1])
    return Nodes(*_written(state, path, slots))


def _written(state: AugmentedState, path: Nodes, slots: Int[Array, "B P"]) -> tuple[Array, Array]:
    """The unfinished group's keys and values with the path's in the given slots; slots beyond the group are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]
    keys, values = (
        old.at[rows, slots].set(new.astype(old.dtype), mode="drop")
        for old, new in ((state.keys, path.keys), (state.values, path.values))
    )
    return keys, values


def commit_path(
    state: AugmentedState, path: Nodes, length: Int[Array, " B"], fold: Callable[[Array, Array], Array]
) -> AugmentedState:
    """The state after the first `length` (at most G) nodes of the path, row by row.

    A path is no longer than a group, so at most one group is finished; it is folded whole, by the same operation
    that plain decoding uses, so that both leave the same bits. `fold(keys, values)` is what a group adds to the memory.
    """
    joined = join(state, path, length)
    memory = state.memory
    if memory is not None:
        memory = _fold_finished(state, path, joined.finished, fold)
    window = None if state.window is None else shift_window(state.window, path.values, length)
    return AugmentedState(memory, *joined.buffer, window, joined.position)


def _fold_finished(
    state: AugmentedState, path: Nodes, finished: Bool[Array, " B"], fold: Callable[[Array, Array], Array]
) -> Float[Array, "B K M E"]:
    """The memory with the finished groups, row by row: rows seldom finish a group at the same time."""
    rows = jnp.argsort(~finished)

    def fold_row(index: Array, memory: Array) -> Array:
        def row(part: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(part, rows[index], 1)

        held = AugmentedState(None, row(state.keys), row(state.values), None, row(state.position))
        group = begun_group(held, Nodes(row(path.keys), row(path.values)))
        return jax.lax.dynamic_update_slice_in_dim(memory, row(memory) + fold(*group), rows[index], 0)

    return jax.lax.fori_loop(0, jnp.sum(finished), fold_row, state.memory)


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
