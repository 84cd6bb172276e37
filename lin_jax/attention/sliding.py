"""Softmax over the last W tokens (Beltagy et al. 2020; Mistral, Jiang et al. 2023), the query's own among them.

`o_t = sum_s softmax_s(c q_t·k_s + b_ts) v_s` over `t - W < s <= t`. The state is a ring of the last W keys and values,
`W K (D + E)` numbers, however long the text is. Whole rows are scored in chunks against their own and the previous
chunk, so that memory grows with the row and not with its square.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.full import causal_softmax, masked_softmax
from lin_jax.attention.layout import Layout, first_segment_id
from pallas_kernels.types import QKV, Nodes, TreeArrays

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
    """

    keys: Float[Array, "*layers B W K D"]
    values: Float[Array, "*layers B W K E"]
    position: Int[Array, "*layers B"]


class SlidingSoftmax(nnx.Module):
    """Causal softmax over the last `window` tokens, in every form.

    Args:
        kv_heads: key/value heads K.
        head_dim: size D of queries and keys.
        value_dim: size E of values.
        window: tokens W that a query sees, itself included.
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
        scale: float,
        implementation: str | None = None,
    ) -> None:
        self.kv_heads, self.head_dim, self.value_dim = kv_heads, head_dim, value_dim
        self.window, self.scale, self.implementation = window, scale, implementation

    def init_state(self, batch: int, capacity: int, dtype: Any) -> RingCache:
        """The empty ring; its size does not depend on `capacity`."""
        del capacity
        shape = (batch, self.window, self.kv_heads)
        return RingCache(
            jnp.zeros((*shape, self.head_dim), dtype),
            jnp.zeros((*shape, self.value_dim), dtype),
            jnp.zeros((batch,), jnp.int32),
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
        key_positions = jnp.concatenate([slots, positions], axis=1)
        known = jnp.broadcast_to((slots >= 0)[:, None], (batch, count, self.window))
        above = jnp.broadcast_to(tree.ancestors, (batch, count, count))
        near = positions[:, :, None] - key_positions[:, None, :] < self.window
        all_keys = jnp.concatenate([state.keys.astype(keys.dtype), keys], axis=1)
        all_values = jnp.concatenate([state.values.astype(values.dtype), values], axis=1)
        added = None if bias is None else bias.between(positions, key_positions)
        mask = jnp.concatenate([known, above], axis=2) & near
        return masked_softmax(queries, all_keys, all_values, mask, added, self.scale), Nodes(keys, values)

    def commit(self, state: RingCache, path: Nodes, length: Int[Array, " B"]) -> RingCache:
        """The ring with the last W of the first `length` nodes of the path written over its oldest tokens."""
        order, size = jnp.arange(path.keys.shape[1]), self.window
        kept = (order < length[:, None]) & (order >= length[:, None] - size)
        slots = jnp.where(kept, (state.position[:, None] + order) % size, size)
        rows = jnp.arange(slots.shape[0])[:, None]
        keys, values = (
            old.at[rows, slots].set(new.astype(old.dtype), mode="drop")
            for old, new in zip((state.keys, state.values), path, strict=True)
        )
        return RingCache(keys, values, state.position + length.astype(state.position.dtype))

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
    back = position[:, None] - _slot_positions(position, size)
    in_row = back <= count[:, None]
    index = jnp.clip(last_index[:, None] + 1 - back, 0, valid.shape[1] - 1)
    known: Bool[Array, "B W"] = in_row | continues[:, None]

    def gather(old: Array, new: Array) -> Array:
        from_row = jnp.take_along_axis(new, index[:, :, None, None], axis=1).astype(old.dtype)
        return jnp.where(known[:, :, None, None], jnp.where(in_row[:, :, None, None], from_row, old), 0)

    return RingCache(gather(state.keys, qkv.keys), gather(state.values, qkv.values), position)
