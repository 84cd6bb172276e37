"""Committing a path in plain XLA: only the path's slots are written, and only rows that finish a group are folded."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.ordering import known_after
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.types import AugmentedState, Nodes

Buffer = tuple[Float[Array, "B G K D"], Float[Array, "B G K E"]]
Fold = Callable[[Float[Array, "B G K D"], Float[Array, "B G K E"]], Float[Array, "B K M E"]]


class Joined(NamedTuple):
    """An unfinished group and a path that follows it, slot by slot.

    Attributes:
        buffer: keys and values of the group in which the path ends; slots beyond its end hold anything.
        finished: `[B]` whether that is another group than the one in which it begins.
        position: `[B]` tokens consumed after the path.
    """

    buffer: Buffer
    finished: Bool[Array, " B"]
    position: Int[Array, " B"]


def join(buffer: Buffer, position: Int[Array, " B"], path: Buffer, length: Int[Array, " B"]) -> Joined:
    """The first `length` (at most G) tokens of a path behind the unfinished group, row by row."""
    size = buffer[0].shape[1]
    finished, after = _advanced(position, length, size)
    order = jnp.arange(path[0].shape[1])
    slots = jnp.where(order < length[:, None], (position[:, None] + order) % size, size)
    return Joined(_written(buffer, path, slots), finished, after)


def _advanced(
    position: Int[Array, " B"], length: Int[Array, " B"], size: int
) -> tuple[Bool[Array, " B"], Int[Array, " B"]]:
    """Mask of the paths that end in another group than they begin in, and the tokens consumed after each."""
    after = position + length.astype(position.dtype)
    return after // size > position // size, after


def begun_group(buffer: Buffer, position: Int[Array, " B"], path: Buffer) -> Buffer:
    """The group in which a path begins, with as much of the path as fits in, row by row."""
    slots = (position % buffer[0].shape[1])[:, None] + jnp.arange(path[0].shape[1])
    return _written(buffer, path, slots)


def fold_finished(
    memory: Float[Array, "B K M E"],
    buffer: Buffer,
    position: Int[Array, " B"],
    path: Buffer,
    finished: Bool[Array, " B"],
    fold: Fold,
) -> Float[Array, "B K M E"]:
    """The memory with the finished groups, row by row: rows seldom finish a group at the same time.

    A group is folded whole, by the same operation however many tokens of it come at a time, so that all ways to it
    leave the same bits. `fold(keys, values)` is what a group adds.
    """
    rows = jnp.argsort(~finished)

    def fold_row(index: Array, carried: tuple[Array, Array]) -> tuple[Array, Array]:
        memory, positions = carried

        def row(part: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(part, rows[index], 1)

        group = begun_group((row(buffer[0]), row(buffer[1])), row(positions), (row(path[0]), row(path[1])))
        new = jax.lax.dynamic_update_slice_in_dim(memory, row(memory) + fold(*group), rows[index], 0)
        # Positions change from turn to turn: of a batch of one, the compiler would else compute the group before the
        # loop, whether it is finished or not.
        return new, positions.at[rows[index]].add(1)

    return jax.lax.fori_loop(0, jnp.sum(finished), fold_row, (memory, position))[0]


def _written(buffer: Buffer, path: Buffer, slots: Int[Array, "B P"]) -> Buffer:
    """A group's keys and values with the path's in the given slots; slots beyond the group are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]
    keys, values = (
        old.at[rows, slots].set(new.astype(old.dtype), mode="drop") for old, new in zip(buffer, path, strict=True)
    )
    return keys, values


def shift_window(
    window: Float[Array, "B W_1 K E"], values: Float[Array, "B P K E"], length: Int[Array, " B"]
) -> Float[Array, "B W_1 K E"]:
    """The last values after the first `length` of some more, row by row."""
    extended = jnp.concatenate([window, values.astype(window.dtype)], axis=1)
    index = length[:, None] + jnp.arange(window.shape[1])
    return jnp.take_along_axis(extended, index[:, :, None, None], axis=1)


def advance_by_path(state: AugmentedState, path: Nodes, length: Int[Array, " B"], fold: Fold) -> AugmentedState:
    """The state after the first `length` (at most G) nodes of the path, row by row.

    A path is no longer than a group, so at most one group is finished; it is folded whole, by the same operation
    that plain decoding uses, so that both leave the same bits. `fold(keys, values)` is what a group adds to the memory.
    """
    buffer, memory, written = (state.keys, state.values), state.memory, length
    finished, position = _advanced(state.position, length, buffer[0].shape[1])
    if memory is not None:
        memory = fold_finished(memory, buffer, state.position, path, finished, fold)
        # The unfinished group is read by then, and is changed where it lies.
        written = known_after(length, memory)
    buffer = join(buffer, state.position, path, written).buffer
    window = None if state.window is None else shift_window(state.window, path.values, length)
    return AugmentedState(memory, *buffer, window, position)


def commit(state: AugmentedState, path: Nodes, length: Int[Array, " B"]) -> AugmentedState:
    """The state after the first `length` nodes of the path, where the memory is `sum k v^T`."""

    def fold(keys: Array, values: Array) -> Array:
        wide = accumulation_dtype(keys.dtype)
        exact = "highest" if keys.dtype == wide else None
        return jnp.einsum("bgkd,bgke->bkde", keys, values, preferred_element_type=wide, precision=exact)

    return advance_by_path(state, path, length, fold)
