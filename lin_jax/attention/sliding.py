"""Softmax over the last W tokens (Beltagy et al. 2020; Mistral, Jiang et al. 2023), the query's own among them.

`o_t = sum_s softmax_s(c q_t·k_s + b_ts) v_s` over `t - W < s <= t` and, for ever, the sinks, the document's first S
tokens (StreamingLLM, Xiao et al. 2024). The state is a ring of the last W keys and values, and those of sinks,
`(W + S) K (D + E)` numbers, however long the text is. Whole rows are scored in chunks against their own and the
previous chunk, so that memory grows with the row and not with its square.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.full import causal_softmax, masked_softmax
from lin_jax.attention.layout import Layout
from lin_jax.attention.pairs import per_head
from pallas_kernels.chunks import first_segment_id
from pallas_kernels.pairs import merge_heads, split_heads
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.types import QKV, Nodes, TreeArrays
from pallas_kernels.windows.normaliser import normalised
from pallas_kernels.windows.rows import Before, Sinks, TokenPlaces, WindowedRows, WindowNodes, early_mask
from pallas_kernels.windows.window import AttentionWindow

# Smaller chunks than this cost about as much.
_MIN_CHUNK = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache:
    """Decode state of softmax over a window: the last W keys and values.

    Attributes:
        keys: `[B, W, K, D]`, position p in slot `p % W`.
        values: `[B, W, K, E]`.
        position: `[B]` tokens consumed so far.
        sink_keys: `[B, S, K, D]` keys of the first tokens, that of position p in slot p; None without sinks.
        sink_values: `[B, S, K, E]` their values.
    """

    keys: Float[Array, "*layers B W K D"]
    values: Float[Array, "*layers B W K E"]
    position: Int[Array, "*layers B"]
    sink_keys: Float[Array, "*layers B S K D"] | None = None
    sink_values: Float[Array, "*layers B S K E"] | None = None


class SlidingSoftmax(nnx.Module):
    """Causal softmax over the last `window` tokens, in every form.

    Args:
        kv_heads: key/value heads K.
        head_dim: size D of queries and keys.
        value_dim: size E of values.
        window: tokens W that a query sees, itself included.
        sinks: first tokens S of a document that it sees besides.
        scale: factor of the scores.
        implementation: of the softmax over whole rows that fit into the window, as in `causal_softmax`.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        window: int,
        sinks: int = 0,
        scale: float,
        implementation: str | None = None,
    ) -> None:
        self.kv_heads, self.head_dim, self.value_dim = kv_heads, head_dim, value_dim
        self.window, self.sinks, self.scale, self.implementation = window, sinks, scale, implementation

    def init_state(self, batch: int, capacity: int, dtype: Any) -> RingCache:
        """The empty ring; its size does not depend on `capacity`."""
        del capacity

        def slots(count: int, size: int) -> Array:
            return jnp.zeros((batch, count, self.kv_heads, size), dtype)

        return RingCache(
            slots(self.window, self.head_dim),
            slots(self.window, self.value_dim),
            jnp.zeros((batch,), jnp.int32),
            slots(self.sinks, self.head_dim) if self.sinks else None,
            slots(self.sinks, self.value_dim) if self.sinks else None,
        )

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: RingCache | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B T H E"], RingCache | None]:
        """Outputs for whole rows, and the state after them if one was given.

        The first document of a row continues the state; the state returned is that of the row's last document.
        """
        length = qkv.keys.shape[1]
        if state is None and bias is None and length <= self.window and layout.aligned and layout.present is None:
            return causal_softmax(*qkv, self.scale, self.implementation), None
        if self.sinks:
            return self._beside_sinks(qkv, layout, state, bias), None if state is None else _after(state, qkv, layout)
        keys = _Keys.of_row(qkv, layout)
        if state is not None:
            keys = _Keys.of_ring(state, layout, qkv).followed_by(keys)
        chunk = max(self.window, _MIN_CHUNK)
        if bias is not None or length <= chunk:
            outputs = self._whole(qkv.queries, keys, layout, bias)
        else:
            outputs = self._chunked(qkv.queries, keys, layout, chunk)
        return outputs, None if state is None else _after(state, qkv, layout)

    def verify(
        self,
        qkv: QKV,
        tree: TreeArrays,
        state: RingCache,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B N H E"], Nodes]:
        """Outputs for the nodes of a tree on top of the ring; deep nodes no longer see what has left their window."""
        queries, keys, values = qkv
        batch, count = keys.shape[:2]
        positions = state.position[:, None] + tree.depth
        slots = _slot_positions(state.position, self.window)
        known, early_keys, early_values = slots >= self.sinks, [state.keys], [state.values]
        if state.sink_keys is not None and state.sink_values is not None:
            order = jnp.broadcast_to(jnp.arange(self.sinks), (batch, self.sinks))
            known = jnp.concatenate([order < state.position[:, None], known], axis=1)
            slots = jnp.concatenate([order, slots], axis=1)
            early_keys, early_values = [state.sink_keys, *early_keys], [state.sink_values, *early_values]
        key_positions = jnp.concatenate([slots, positions], axis=1)
        known = jnp.broadcast_to(known[:, None], (batch, count, known.shape[1]))
        above = jnp.broadcast_to(tree.ancestors, (batch, count, count))
        near = positions[:, :, None] - key_positions[:, None, :] < self.window
        near = near | (key_positions < self.sinks)[:, None, :] if self.sinks else near
        all_keys = jnp.concatenate([*(part.astype(keys.dtype) for part in early_keys), keys], axis=1)
        all_values = jnp.concatenate([*(part.astype(values.dtype) for part in early_values), values], axis=1)
        added = None if bias is None else bias.between(positions, key_positions)
        mask = jnp.concatenate([known, above], axis=2) & near
        return masked_softmax(queries, all_keys, all_values, mask, added, self.scale), Nodes(keys, values)

    def commit(self, state: RingCache, path: Nodes, length: Int[Array, " B"]) -> RingCache:
        """The ring with the last W of the first `length` nodes of the path written over its oldest tokens."""
        order, size = jnp.arange(path.keys.shape[1]), self.window
        kept = (order < length[:, None]) & (order >= length[:, None] - size)
        positions = state.position[:, None] + order
        slots = jnp.where(kept, positions % size, size)
        rows = jnp.arange(slots.shape[0])[:, None]

        def written(old: Array, new: Array, slots: Array) -> Array:
            return old.at[rows, slots].set(new.astype(old.dtype), mode="drop")

        keys, values = written(state.keys, path.keys, slots), written(state.values, path.values, slots)
        state = replace(state, position=state.position + length.astype(state.position.dtype), keys=keys, values=values)
        if state.sink_keys is None or state.sink_values is None:
            return state
        slots = jnp.where(order < length[:, None], positions, self.sinks)
        sinks = written(state.sink_keys, path.keys, slots), written(state.sink_values, path.values, slots)
        return replace(state, sink_keys=sinks[0], sink_values=sinks[1])

    def _beside_sinks(
        self, qkv: QKV, layout: Layout, state: RingCache | None, bias: RelativeBias | None
    ) -> Float[Array, "B T H E"]:
        """Outputs in chunks; each sees its own keys, those of the chunk before it, and its document's sinks."""
        readable, first = jnp.where(layout.valid, layout.segment_ids, 0), first_segment_id(layout.segment_ids)
        places, early = TokenPlaces(readable, layout.segment_ids, layout.positions, first, layout.aligned), None
        if state is not None and state.sink_keys is not None and state.sink_values is not None:
            # The oldest token is in no window any more.
            ring = _Keys.of_ring(state, layout, qkv)
            tokens = WindowNodes(ring.keys[:, 1:], ring.values[:, 1:], None)
            sinks = Sinks(state.sink_keys, state.sink_values, early_mask(state.position, self.sinks))
            early = Before(tokens, ring.positions[:, 1:], sinks)
        queries = split_heads(qkv.queries, self.kv_heads)
        window = AttentionWindow(self.window, sinks=self.sinks)
        rows = WindowedRows.of(window, queries, WindowNodes(qkv.keys, qkv.values, None), places, early)
        added = None
        if bias is not None:
            added = per_head(bias.between(rows.query_positions, rows.key_positions), self.kv_heads)
        nothing = jnp.zeros((*rows.queries.shape[:-1], self.value_dim + 1), accumulation_dtype(qkv.values.dtype))
        outputs = normalised(rows.queries, rows.pairs(added), nothing, nothing[..., 0], self.scale)
        return merge_heads(rows.flatten(outputs)).astype(qkv.values.dtype)

    def _whole(
        self, queries: Float[Array, "B T H D"], keys: "_Keys", layout: Layout, bias: RelativeBias | None
    ) -> Float[Array, "B T H E"]:
        """Outputs over one matrix of pairs."""
        distance = layout.positions[:, :, None] - keys.positions[:, None, :]
        mask = (layout.segment_ids[:, :, None] == keys.segments[:, None, :]) & (distance >= 0)
        added = None if bias is None else bias.between(layout.positions, keys.positions)
        return masked_softmax(queries, keys.keys, keys.values, mask & (distance < self.window), added, self.scale)

    def _chunked(
        self, queries: Float[Array, "B T H D"], keys: "_Keys", layout: Layout, chunk: int
    ) -> Float[Array, "B T H E"]:
        """Outputs in chunks of at least a window; each sees its own keys and those of the chunk before it.

        In a document, tokens that stand side by side have neighbouring positions: distances are those of places.
        """
        batch, length = queries.shape[:2]
        count = -(-length // chunk)
        after = count * chunk - length
        before = chunk - (keys.keys.shape[1] - length)

        def pairs(part: Array, fill: int = 0) -> Array:
            """Keys of every chunk and of the one before it, `[B n, 2 C, ...]`."""
            widths = [(0, 0), (before, after)] + [(0, 0)] * (part.ndim - 2)
            cut = jnp.pad(part, widths, constant_values=fill).reshape(batch, count + 1, chunk, *part.shape[2:])
            both = jnp.concatenate([cut[:, :-1], cut[:, 1:]], axis=2)
            return both.reshape(batch * count, 2 * chunk, *part.shape[2:])

        def own(part: Array) -> Array:
            widths = [(0, 0), (0, after)] + [(0, 0)] * (part.ndim - 2)
            return jnp.pad(part, widths).reshape(batch * count, chunk, *part.shape[2:])

        distance = chunk + jnp.arange(chunk)[:, None] - jnp.arange(2 * chunk)
        mask = own(layout.segment_ids)[:, :, None] == pairs(keys.segments, -1)[:, None, :]
        mask = mask & (distance >= 0) & (distance < self.window)
        outputs = masked_softmax(own(queries), pairs(keys.keys), pairs(keys.values), mask, None, self.scale)
        return outputs.reshape(batch, count * chunk, *outputs.shape[2:])[:, :length]


class _Keys(NamedTuple):
    """Keys and values that queries may see, in the order of the text.

    Attributes:
        keys: `[B, S, K, D]`.
        values: `[B, S, K, E]`.
        positions: `[B, S]` in their documents.
        segments: `[B, S]` number of the document, -1 for what nothing may see.
    """

    keys: Float[Array, "B S K D"]
    values: Float[Array, "B S K E"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]

    @classmethod
    def of_row(cls, qkv: QKV, layout: Layout) -> "_Keys":
        return cls(qkv.keys, qkv.values, layout.positions, jnp.where(layout.valid, layout.segment_ids, -1))

    @classmethod
    def of_ring(cls, state: RingCache, layout: Layout, qkv: QKV) -> "_Keys":
        """The ring's tokens, oldest first, as part of the row's first document."""
        size = state.keys.shape[1]
        order = jnp.arange(size)
        positions = state.position[:, None] - size + order
        slots = ((state.position[:, None] + order) % size)[:, :, None, None]
        keys, values = (
            jnp.take_along_axis(old, slots, axis=1).astype(new.dtype)
            for old, new in ((state.keys, qkv.keys), (state.values, qkv.values))
        )
        first = first_segment_id(layout.segment_ids)[:, None]
        return cls(keys, values, positions, jnp.where(positions >= 0, first, -1))

    def followed_by(self, row: "_Keys") -> "_Keys":
        return _Keys(*(jnp.concatenate(parts, axis=1) for parts in zip(self, row, strict=True)))


def _slot_positions(position: Int[Array, " B"], size: int) -> Int[Array, "B W"]:
    """Position of the token in each slot of a ring; negative where there is none yet."""
    last = position[:, None] - 1
    return last - (last - jnp.arange(size)) % size


def _after(state: RingCache, qkv: QKV, layout: Layout) -> RingCache:
    """The ring after whole rows: the last tokens of each row's last document, behind what it continues."""
    size, valid = state.keys.shape[1], layout.valid
    last_index = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), -1), axis=1)
    last = jnp.take_along_axis(layout.segment_ids, jnp.maximum(last_index, 0)[:, None], axis=1)
    count = jnp.sum(valid & (layout.segment_ids == last), axis=1)
    continues = (last[:, 0] == first_segment_id(layout.segment_ids)) | (last_index < 0)
    position = (jnp.where(continues, state.position, 0) + count).astype(state.position.dtype)

    def gather(old: Array, new: Array, positions: Int[Array, "B S"]) -> Array:
        """The tokens at these positions: from the rows where they reach that far, else what the slot held."""
        back = position[:, None] - positions
        in_row: Bool[Array, "B S"] = (back > 0) & (back <= count[:, None])
        index = jnp.clip(last_index[:, None] + 1 - back, 0, valid.shape[1] - 1)
        from_row = jnp.take_along_axis(new, index[:, :, None, None], axis=1).astype(old.dtype)
        known = in_row | ((back > 0) & continues[:, None])
        return jnp.where(known[:, :, None, None], jnp.where(in_row[:, :, None, None], from_row, old), 0)

    slots = _slot_positions(position, size)
    after = RingCache(gather(state.keys, qkv.keys, slots), gather(state.values, qkv.values, slots), position)
    if state.sink_keys is None or state.sink_values is None:
        return after
    slots = jnp.broadcast_to(jnp.arange(state.sink_keys.shape[1]), (valid.shape[0], state.sink_keys.shape[1]))
    keys, values = gather(state.sink_keys, qkv.keys, slots), gather(state.sink_values, qkv.values, slots)
    return replace(after, sink_keys=keys, sink_values=values)
