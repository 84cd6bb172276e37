"""Linformer (Wang et al. 2020), group by group: finished groups are projected to r summaries each.

`o_t = softmax(q_t·[k_s of t's own group up to t, E^T K of finished groups] / D^0.5) [v_s, F^T V]`, with learnt
`E, F` of `[G, r]`. State: `2 r K D` numbers for every finished group, which grows with the text (an r/G-th of a softmax
cache), and the unfinished group. Bidirectional: all groups, the query's own one among them, as summaries.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.chunks import Chunks
from lin_jax.attention.layout import Layout
from lin_jax.attention.state import TreePairs, advance
from pallas_kernels.chunks import first_segment_id
from pallas_kernels.pairs import EXACT, merge_heads, pair_scores, split_heads, weighted_values
from pallas_kernels.path_commit.xla import begun_group, join
from pallas_kernels.precision import accumulation_dtype, upcast
from pallas_kernels.types import QKV, AugmentedState, Nodes, TreeArrays


class Summaries(NamedTuple):
    """Summaries of groups, and the documents that they belong to.

    Attributes:
        keys: `[B, S, r, K, D]`.
        values: `[B, S, r, K, E]`.
        segment_ids: `[B, S]` segment id of each group, 0 where there is no group.
        groups: `[B, S]` its number in the document.
    """

    keys: Float[Array, "B S r K D"]
    values: Float[Array, "B S r K E"]
    segment_ids: Int[Array, "B S"]
    groups: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinformerState:
    """Decode state: summaries of finished groups, and the unfinished group.

    Attributes:
        keys: `[B, C/G, r, K, D]`, group g in slot g.
        values: `[B, C/G, r, K, E]`.
        buffer: the unfinished group.
    """

    keys: Float[Array, "*layers B S r K D"]
    values: Float[Array, "*layers B S r K E"]
    buffer: AugmentedState

    @property
    def position(self) -> Int[Array, "*layers B"]:
        """`[B]` tokens consumed so far."""
        return self.buffer.position


class LinformerAttention(nnx.Module):
    """Softmax over the own group's tokens and the summaries of finished groups.

    The projections start as means over r equal parts of a group.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        group_size: int,
        rank: int,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.kv_heads, self.head_dim, self.value_dim = kv_heads, head_dim, value_dim
        self.group_size, self.rank = group_size, rank
        parts = np.arange(group_size) * rank // group_size
        means = (parts[:, None] == np.arange(rank)) / np.bincount(parts, minlength=rank)
        self.key_projection = nnx.Param(jnp.asarray(means, param_dtype))
        self.value_projection = nnx.Param(jnp.asarray(means, param_dtype))

    def init_state(self, batch: int, capacity: int, dtype: Any) -> LinformerState:
        """No summaries, with room for those of `capacity` tokens per sequence."""
        lead = (batch, -(-capacity // self.group_size), self.rank, self.kv_heads)
        wide = accumulation_dtype(dtype)
        slots = (batch, self.group_size, self.kv_heads)
        keys, values = (jnp.zeros((*slots, size), dtype) for size in (self.head_dim, self.value_dim))
        buffer = AugmentedState(None, keys, values, None, jnp.zeros((batch,), jnp.int32))
        return LinformerState(jnp.zeros((*lead, self.head_dim), wide), jnp.zeros((*lead, self.value_dim), wide), buffer)

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: LinformerState | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B T H E"], LinformerState | None]:
        """Outputs for whole rows, and the state after them if one was given."""
        queries, keys, values = qkv
        buffer = None if state is None else state.buffer
        rows = Chunks.of(split_heads(queries, self.kv_heads), keys, values, layout, buffer, self.group_size)
        batch, count, size = rows.queries.shape[:3]
        new = self._finished_groups(rows)
        asking = rows.segment_ids[:, -count:].reshape(batch, -1), rows.positions[:, -count:].reshape(batch, -1)
        group = asking[1] // size
        seen = (asking[0][:, :, None] == new.segment_ids[:, None]) & (new.groups[:, None] < group[:, :, None])
        sources = [(new.keys, new.values, seen & (new.segment_ids > 0)[:, None])]
        if state is not None:
            first = first_segment_id(layout.segment_ids)
            cached = jnp.arange(state.keys.shape[1]) < (state.position // size)[:, None]
            cached = cached[:, None] & (asking[0] == first[:, None])[:, :, None]
            sources.append((state.keys, state.values, cached))
        own = self._scores(rows.queries, rows.window_keys)
        own = jnp.where(rows.masks.same_group[..., None, None, :, :], own, jnp.finfo(own.dtype).min)
        flat = rows.queries.reshape(batch, count * size, *rows.queries.shape[3:])
        window = own.shape[-1]
        own = jnp.moveaxis(own, 1, 3).reshape(batch, *own.shape[2:4], count * size, window)
        weights = self._softmax([own, *(self._summary_scores(flat, keys, mask) for keys, _, mask in sources)])
        own_weights = jnp.moveaxis(weights[0].reshape(*weights[0].shape[:3], count, size, window), 3, 1)
        outputs = rows.flatten(weighted_values(own_weights, rows.window_values))
        for weight, (_, summaries, _) in zip(weights[1:], sources, strict=True):
            read = weighted_values(weight, summaries.reshape(batch, -1, *summaries.shape[3:]))
            outputs = outputs + read[:, : keys.shape[1]]
        after = None if state is None else self._advanced(state, keys, values, layout, new)
        return merge_heads(outputs).astype(values.dtype), after

    def verify(
        self,
        qkv: QKV,
        tree: TreeArrays,
        state: LinformerState,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B N H E"], Nodes]:
        """Outputs for the nodes of a tree; a group that a node's own path finishes is summarised for that node."""
        queries, nodes, buffer = split_heads(qkv.queries, self.kv_heads), Nodes(qkv.keys, qkv.values), state.buffer
        pairs = TreePairs.of(buffer, nodes, tree)
        own = self._scores(queries, pairs.keys)
        own = jnp.where(pairs.masks.same_group[:, None, None], own, jnp.finfo(own.dtype).min)

        earlier = pairs.masks.earlier_group
        assert earlier is not None
        crossed_keys, crossed_values = (
            jnp.einsum("bnm,bmr,bmkd->bnrkd", earlier.astype(wide.dtype), weights, wide, precision=EXACT)
            for weights, wide in self._weighed(pairs.key_positions, pairs.keys, pairs.values)
        )
        crossed = jnp.einsum("bnkhd,bnrkd->bkhnr", queries.astype(crossed_keys.dtype), crossed_keys, precision=EXACT)
        has_crossed = jnp.any(earlier, axis=2)[:, None, None, :, None]
        crossed = jnp.where(has_crossed, crossed * self.head_dim**-0.5, jnp.finfo(crossed.dtype).min)

        cached = jnp.arange(state.keys.shape[1]) < (buffer.position // self.group_size)[:, None]
        cached = jnp.broadcast_to(cached[:, None], (*pairs.positions.shape, cached.shape[1]))
        weights = self._softmax([own, crossed, self._summary_scores(queries, state.keys, cached)])
        outputs = weighted_values(weights[0], pairs.values)
        outputs = outputs + jnp.einsum("bkhnr,bnrkd->bnkhd", weights[1], crossed_values, precision=EXACT)
        outputs = outputs + weighted_values(
            weights[2], state.values.reshape(*state.values.shape[:1], -1, *state.values.shape[3:])
        )
        return merge_heads(outputs).astype(qkv.values.dtype), nodes

    def commit(self, state: LinformerState, path: Nodes, length: Int[Array, " B"]) -> LinformerState:
        """The state after the first `length` (at most G) nodes of the path, row by row."""
        buffer = state.buffer.keys, state.buffer.values
        joined = join(buffer, state.buffer.position, path, length)
        begun = begun_group(buffer, state.buffer.position, path)
        slots = jnp.broadcast_to(jnp.arange(self.group_size), begun[0].shape[:2])
        group = jnp.where(joined.finished, state.position // self.group_size, state.keys.shape[1])
        rows = jnp.arange(group.shape[0])
        caches = [
            cache.at[rows, group].set(jnp.einsum("bsr,bskd->brkd", weights, wide, precision=EXACT), mode="drop")
            for cache, (weights, wide) in zip((state.keys, state.values), self._weighed(slots, *begun), strict=True)
        ]
        return LinformerState(caches[0], caches[1], AugmentedState(None, *joined.buffer, None, joined.position))

    def bidirectional(self, qkv: QKV, layout: Layout, bias: RelativeBias | None = None) -> Float[Array, "B T H E"]:
        """Outputs for an encoder's rows: softmax over the summaries of all groups of the document."""
        queries, keys, values = qkv
        positions = layout.positions
        begins = positions % self.group_size == 0
        slots = jnp.cumsum(begins, axis=1) - 1
        count = -(-keys.shape[1] // self.group_size) if layout.aligned else keys.shape[1]
        slots = jnp.where(layout.valid, slots, count)
        summaries = self._summarised(keys, values, positions, layout.segment_ids, slots, count)
        mask = layout.segment_ids[:, :, None] == summaries.segment_ids[:, None]
        scores = self._summary_scores(split_heads(queries, self.kv_heads), summaries.keys, mask)
        weights = jax.nn.softmax(scores, axis=-1)
        outputs = weighted_values(weights, summaries.values.reshape(keys.shape[0], -1, *summaries.values.shape[3:]))
        return merge_heads(outputs).astype(values.dtype)

    def _finished_groups(self, rows: Chunks) -> Summaries:
        """Summaries of the groups that end in these rows, in order."""
        batch, count, size = rows.keys.shape[:3]
        keys, values, segment_ids, positions = (
            part.reshape(batch, count * size, *part.shape[3:])
            for part in (rows.keys, rows.values, rows.segment_ids, rows.positions)
        )
        ends = (segment_ids > 0) & (positions % size == size - 1)
        rank = jnp.cumsum(ends, axis=1) - ends
        row = jnp.arange(batch)[:, None]
        owner = jnp.where(ends, rank, count)
        group_of = jnp.full((batch, count), -1, positions.dtype).at[row, owner].set(positions // size, mode="drop")
        segment_of = jnp.zeros((batch, count), segment_ids.dtype).at[row, owner].set(segment_ids, mode="drop")
        mine = (jnp.take_along_axis(group_of, jnp.minimum(rank, count - 1), axis=1) == positions // size) & (
            jnp.take_along_axis(segment_of, jnp.minimum(rank, count - 1), axis=1) == segment_ids
        )
        mine = mine & (segment_ids > 0) & (rank < count)
        if rows.present is not None:
            mine = mine & rows.present.reshape(batch, -1)
        return self._summarised(keys, values, positions, segment_ids, jnp.where(mine, rank, count), count)

    def _summarised(
        self,
        keys: Float[Array, "B T K D"],
        values: Float[Array, "B T K E"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        slots: Int[Array, "B T"],
        count: int,
    ) -> Summaries:
        """Adds tokens up in the slot of their group; those whose slot is `count` are left out."""
        row = jnp.arange(keys.shape[0])[:, None]
        sums = [
            jnp.zeros((keys.shape[0], count, self.rank, *wide.shape[2:]), wide.dtype)
            .at[row, slots]
            .add(weights[..., None, None] * wide[:, :, None], mode="drop")
            for weights, wide in self._weighed(positions, keys, values)
        ]
        lead = (keys.shape[0], count)
        owners = jnp.zeros(lead, segment_ids.dtype).at[row, slots].set(segment_ids, mode="drop")
        groups = jnp.zeros(lead, positions.dtype).at[row, slots].set(positions // self.group_size, mode="drop")
        return Summaries(sums[0], sums[1], owners, groups)

    def _weighed(self, positions: Array, keys: Array, values: Array) -> list[tuple[Array, Array]]:
        """Each token's `[r]` weights in its group's summaries beside the token, for keys and for values."""
        pairs = []
        for projection, tokens in ((self.key_projection, keys), (self.value_projection, values)):
            wide = upcast(tokens)
            pairs.append((projection[...].astype(wide.dtype)[positions % self.group_size], wide))
        return pairs

    def _scores(self, queries: Array, keys: Array) -> Array:
        return pair_scores(queries, keys) * self.head_dim**-0.5

    def _summary_scores(
        self, queries: Float[Array, "B T K R D"], keys: Float[Array, "B S r K D"], mask: Bool[Array, "B T S"]
    ) -> Float[Array, "B K R T Sr"]:
        scores = self._scores(queries.astype(keys.dtype), keys.reshape(keys.shape[0], -1, *keys.shape[3:]))
        allowed = jnp.repeat(mask, self.rank, axis=2)[:, None, None]
        return jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)

    def _softmax(self, parts: list[Array]) -> list[Array]:
        """One softmax over the last axes of all parts together."""
        weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1)
        edges = np.cumsum([part.shape[-1] for part in parts])[:-1]
        return jnp.split(weights, edges, axis=-1)

    def _advanced(
        self, state: LinformerState, keys: Array, values: Array, layout: Layout, new: Summaries
    ) -> LinformerState:
        """The state after whole rows: summaries of the last document's groups, and its unfinished group."""
        buffer = advance(state.buffer, keys, values, layout, None)
        index = jnp.max(jnp.where(layout.valid, jnp.arange(keys.shape[1]), 0), axis=1, keepdims=True)
        last = jnp.take_along_axis(layout.segment_ids, index, axis=1)
        slots = jnp.where((new.segment_ids == last) & (last > 0), new.groups, state.keys.shape[1])
        row = jnp.arange(keys.shape[0])[:, None]
        return LinformerState(
            state.keys.at[row, slots].set(new.keys, mode="drop"),
            state.values.at[row, slots].set(new.values, mode="drop"),
            buffer,
        )
