"""Decode state of attention over a window and a memory, and the state after more tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lin_jax.attention.layout import Layout
from pallas_kernels.chunks import first_segment_id
from pallas_kernels.ordering import known_after
from pallas_kernels.path_commit.xla import shift_window
from pallas_kernels.types import WindowedState as WindowedState
from pallas_kernels.window_verify.problem import Slots, ring_slots
from pallas_kernels.windows.rows import Fold, Sinks, WindowNodes, early_mask
from pallas_kernels.windows.window import AttentionWindow


def held(window: AttentionWindow, position: Int[Array, " B"]) -> Slots:
    """The slots in use when `position` tokens have been consumed; sinks are in slots of their own."""
    return ring_slots(position, jnp.maximum(window.start(position), window.sinks), window.capacity)


def sinks_of(state: WindowedState) -> Sinks | None:
    """The sinks of a state; None if it keeps none."""
    if state.sink_keys is None or state.sink_values is None:
        return None
    return Sinks(state.sink_keys, state.sink_values, early_mask(state.position, state.sink_keys.shape[1]))


def with_sinks(state: WindowedState, slots: Slots) -> tuple[WindowNodes, Slots]:
    """Keys and values of a state's sinks, if it has any, before those of its ring's slots."""
    if (sinks := sinks_of(state)) is None:
        return WindowNodes(state.keys, state.values, None), slots
    order = jnp.broadcast_to(jnp.arange(sinks.mask.shape[1]), sinks.mask.shape)
    tokens = WindowNodes(
        jnp.concatenate([sinks.keys, state.keys], axis=1), jnp.concatenate([sinks.values, state.values], axis=1), None
    )
    positions = jnp.concatenate([order, slots.positions], axis=1)
    return tokens, Slots(positions, jnp.concatenate([sinks.mask, slots.mask], axis=1))


def in_order(window: AttentionWindow, state: WindowedState) -> tuple[WindowNodes, Slots]:
    """The window's tokens from the oldest slot to the newest."""
    size = window.capacity
    order = (state.position[:, None] + jnp.arange(size)) % max(size, 1)

    def take(part: Array) -> Array:
        return jnp.take_along_axis(part, order.reshape(*order.shape, *(1,) * (part.ndim - 2)), axis=1)

    tokens = WindowNodes(take(state.keys), take(state.values), None if state.decays is None else take(state.decays))
    slots = held(window, state.position)
    return tokens, Slots(take(slots.positions), take(slots.mask))


def advance(
    window: AttentionWindow, state: WindowedState, tokens: WindowNodes, layout: Layout, memory: Array
) -> WindowedState:
    """The state after whole rows: `memory` as given, everything else gathered from the rows and the old state."""
    valid, index = layout.valid, jnp.arange(layout.segment_ids.shape[1])
    last_index = jnp.max(jnp.where(valid, index, -1), axis=1)
    last = jnp.take_along_axis(layout.segment_ids, jnp.maximum(last_index, 0)[:, None], axis=1)
    count = jnp.sum(valid & (layout.segment_ids == last), axis=1)[:, None]
    continues = (last[:, 0] == first_segment_id(layout.segment_ids)) | (last_index < 0)
    position = (jnp.where(continues, state.position, 0) + count[:, 0]).astype(state.position.dtype)

    def gather(old: Array, new: Array, distance: Array, old_index: Array) -> Array:
        """Tokens `distance` before the end: from the rows where they reach that far, else from `old`."""
        extended = jnp.concatenate([old, new.astype(old.dtype)], axis=1)
        in_row = (distance > 0) & (distance <= count)
        index = jnp.where(in_row, old.shape[1] + last_index[:, None] + 1 - distance, old_index)
        index = jnp.clip(index, 0, extended.shape[1] - 1).reshape(*index.shape, *(1,) * (old.ndim - 2))
        known = in_row | ((distance > 0) & continues[:, None] & (old_index >= 0))
        found = jnp.take_along_axis(extended, index, axis=1)
        return jnp.where(known.reshape(*known.shape, *(1,) * (old.ndim - 2)), found, 0)

    slots = held(window, position)
    ring = position[:, None] - slots.positions, jnp.broadcast_to(jnp.arange(window.capacity), slots.mask.shape)
    convolved = state.convolved
    if convolved is not None:
        width = convolved.shape[1]
        back = jnp.broadcast_to(jnp.arange(width, 0, -1), (position.shape[0], width))
        convolved = gather(convolved, tokens.values, back, width - (back - count))
    decays = None
    if state.decays is not None and tokens.decays is not None:
        decays = gather(state.decays, tokens.decays, *ring)
    keys, values = gather(state.keys, tokens.keys, *ring), gather(state.values, tokens.values, *ring)
    sinks: tuple[Array | None, Array | None] = (None, None)
    if state.sink_keys is not None and state.sink_values is not None:
        order = jnp.broadcast_to(jnp.arange(window.sinks), (position.shape[0], window.sinks))
        since = position[:, None] - order
        sinks = (
            gather(state.sink_keys, tokens.keys, since, order),
            gather(state.sink_values, tokens.values, since, order),
        )
    return WindowedState(memory, keys, values, decays, convolved, position, *sinks)


def commit_path(
    window: AttentionWindow, state: WindowedState, path: WindowNodes, length: Int[Array, " B"], fold: Fold
) -> WindowedState:
    """The state after the first `length` nodes of a path, row by row.

    By the operations that plain decoding uses, so that both leave the same bits: a group is folded whole, and single
    tokens one after another.
    """
    convolved = None if state.convolved is None else shift_window(state.convolved, path.values, length)
    if window.tokens is None and not window.sinks and path.keys.shape[1] <= window.group_size:
        return replace(_commit_within_groups(window, state, path, length, fold), convolved=convolved)

    if window.tokens is not None:
        return replace(_commit_sliding(window, state, path, length, fold), convolved=convolved)

    def step(state: WindowedState, node: tuple[Array, WindowNodes]) -> tuple[WindowedState, None]:
        number, token = node
        return _commit_token(window, state, token, number < length, fold), None

    count = path.keys.shape[1]
    if count == 1:
        state = step(state, (jnp.zeros((), int), jax.tree.map(lambda part: part[:, 0], path)))[0]
    else:
        nodes = jax.tree.map(lambda part: jnp.moveaxis(part, 1, 0), path)
        state = jax.lax.scan(step, state, (jnp.arange(count), nodes))[0]
    return replace(state, convolved=convolved)


def _commit_sliding(
    window: AttentionWindow, state: WindowedState, path: WindowNodes, length: Int[Array, " B"], fold: Fold
) -> WindowedState:
    """The state of a sliding window after a path: what leaves it is folded token by token, the rest is one write."""
    position, size, order = state.position, window.capacity, jnp.arange(path.keys.shape[1])
    own, taken = position[:, None] + order, order < length[:, None]
    # A token takes the slot of the one that leaves, which may be one of the path.
    held = WindowNodes(state.keys, state.values, state.decays)
    index, every = jnp.where(order < size, own % max(size, 1), order), path
    if order.size <= size:
        every = held
    elif size:
        every = jax.tree.map(lambda ring, new: jnp.concatenate([ring, new.astype(ring.dtype)], axis=1), held, path)
    rows = jnp.arange(position.shape[0])[:, None]
    leaving = jax.tree.map(lambda part: part[rows, index], every)
    # Sinks are no part of the memory.
    memory = _folded_tokens(state.memory, leaving, taken & (own >= size + window.sinks), fold)
    taken = order < known_after(length, memory)[:, None]
    after = replace(state, memory=memory)
    if window.sinks:
        after = _with_sinks(after, path, own, taken)
    if size:
        after = _written(after, path, own, taken & (order >= length[:, None] - size))
    return replace(after, position=position + length.astype(position.dtype))


def _commit_within_groups(
    window: AttentionWindow, state: WindowedState, path: WindowNodes, length: Int[Array, " B"], fold: Fold
) -> WindowedState:
    """The state after a path that finishes one group at the most, in one write and without a loop over the path."""
    position, order = state.position, jnp.arange(path.keys.shape[1])
    end = (position // window.group_size + 1) * window.group_size
    own, taken = position[:, None] + order, order < length[:, None]
    finished = (position + length >= end) & (end >= window.capacity)
    # A window of the own group alone is the group that the path finishes; of a larger one, an earlier group leaves.
    ring = state if window.groups else _written(state, path, own, taken & (own < end[:, None]))
    memory = _folded_groups(window, replace(ring, position=end), finished, fold)
    taken = order < known_after(length, memory)[:, None]
    after = _written(state, path, own, taken)
    return replace(after, memory=memory, position=position + length.astype(position.dtype))


def _written(
    state: WindowedState, tokens: WindowNodes, positions: Int[Array, "B P"], taken: Bool[Array, "B P"]
) -> WindowedState:
    """The state with tokens in their slots of the ring, where they are taken."""
    size, rows = state.keys.shape[1], jnp.arange(positions.shape[0])[:, None]
    slots = jnp.where(taken, positions % size, size)

    def write(ring: Array, new: Array) -> Array:
        return ring.at[rows, slots].set(new.astype(ring.dtype), mode="drop")

    decays = state.decays
    if decays is not None and tokens.decays is not None:
        decays = write(decays, tokens.decays)
    return replace(state, keys=write(state.keys, tokens.keys), values=write(state.values, tokens.values), decays=decays)


def _commit_token(
    window: AttentionWindow, state: WindowedState, token: WindowNodes, taken: Bool[Array, " B"], fold: Fold
) -> WindowedState:
    """The state of a window of groups after one token `[B, ...]`, in the rows that take it."""
    position = state.position
    after = position + taken.astype(position.dtype)
    one = jax.tree.map(lambda part: part[:, None], token)
    if window.sinks:
        state = _with_sinks(state, one, position[:, None], taken[:, None])
    state = replace(_written(state, one, position[:, None], taken[:, None]), position=after)
    finished = taken & (after % window.group_size == 0) & (after >= window.capacity)
    return replace(state, memory=_folded_groups(window, state, finished, fold))


def _with_sinks(
    state: WindowedState, tokens: WindowNodes, positions: Int[Array, "B P"], taken: Bool[Array, "B P"]
) -> WindowedState:
    """The state with tokens among its sinks, where they are taken and are sinks."""
    assert state.sink_keys is not None
    assert state.sink_values is not None
    rows, size = jnp.arange(positions.shape[0])[:, None], state.sink_keys.shape[1]
    slots = jnp.where(taken, positions, size)
    keys, values = (
        old.at[rows, slots].set(new.astype(old.dtype), mode="drop")
        for old, new in ((state.sink_keys, tokens.keys), (state.sink_values, tokens.values))
    )
    return replace(state, sink_keys=keys, sink_values=values)


def _folded_tokens(memory: Array, tokens: WindowNodes, leaves: Bool[Array, "B P"], fold: Fold) -> Array:
    """The memory with some tokens `[B, P, ...]`, one after the other, in the rows that they leave the window of."""

    def add(number: Array, memory: Array) -> Array:
        token = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, number, axis=1, keepdims=False), tokens)
        leaving = jax.lax.dynamic_index_in_dim(leaves, number, axis=1, keepdims=False)
        return _folded_token(memory, token, leaving, fold)

    if leaves.shape[1] == 1:
        return add(jnp.zeros((), jnp.int32), memory)
    # None does before the window is full, or behind the accepted ones.
    some = jnp.any(leaves, axis=0)
    begin, end = jnp.argmax(some), leaves.shape[1] - jnp.argmax(some[::-1])
    return jax.lax.fori_loop(begin, jnp.where(some[begin], end, begin), add, memory)


def _folded_token(memory: Array, token: WindowNodes, leaves: Bool[Array, " B"], fold: Fold) -> Array:
    if token.decays is None:
        return _with_token(memory, token, leaves, fold)
    # Behind the condition it is compiled alone: within a larger program multiplication and addition would round as one
    # in some programs, and in others not.
    return jax.lax.cond(
        jnp.any(leaves), lambda memory: _with_token(memory, token, leaves, fold), lambda memory: memory, memory
    )


def _with_token(memory: Array, token: WindowNodes, leaves: Bool[Array, " B"], fold: Fold) -> Array:
    """The memory, decayed and with a token, in the rows that it leaves the window of."""
    decayed = memory
    if token.decays is not None:
        decayed = memory * jnp.exp(token.decays)[..., None, None].astype(memory.dtype)
    added = fold(token.keys[:, None], token.values[:, None], None)
    return jnp.where(leaves[:, None, None, None], decayed + added, memory)


def _folded_groups(window: AttentionWindow, state: WindowedState, finished: Bool[Array, " B"], fold: Fold) -> Array:
    """The memory with the group that has left the window, in the rows where one has: seldom all at the same time."""
    size, rows = window.group_size, jnp.argsort(~finished)

    def fold_row(number: Array, carried: tuple[Array, Array]) -> tuple[Array, Array]:
        memory, ends = carried
        row = rows[number]
        end = ends[row]
        first = end % window.capacity

        def cut(part: Array) -> Array:
            own = jax.lax.dynamic_slice_in_dim(part, row, 1)
            return jax.lax.dynamic_slice_in_dim(own, first, size, axis=1)

        old, factors = jax.lax.dynamic_slice_in_dim(memory, row, 1), None
        if window.sinks:
            order = jnp.arange(size)[None, :, None]
            factors = (end - window.capacity + order >= window.sinks).astype(memory.dtype)
        if state.decays is not None:
            decays = cut(state.decays)
            after = jnp.cumsum(decays[:, ::-1], axis=1)[:, ::-1]
            own = jnp.exp(after - decays)
            factors = own if factors is None else own * factors
            old = old * jnp.exp(after[:, 0])[..., None, None].astype(memory.dtype)
        new = old + fold(cut(state.keys), cut(state.values), factors)
        # Places change from turn to turn: of a batch of one, the compiler would else compute the group before the loop,
        # whether it is finished or not.
        return jax.lax.dynamic_update_slice_in_dim(memory, new, row, 0), ends.at[row].add(size)

    return jax.lax.fori_loop(0, jnp.sum(finished), fold_row, (state.memory, state.position))[0]
