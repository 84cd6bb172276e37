"""Local, linear and convolution branches, each of them optional, composed into one attention with all its forms.

`o_t = combine(sum_{s in t's group} a(q_t, k_s) v_s + alpha finish(sum phi(q_t)·phi(k_s) v_s)) + sum_{j<W} w_j v_{t-j}`

With a local branch of relu(q·k)^2, a linear branch over finished groups and the convolution this is augmented linear
attention (You et al., ICML 2024). The state has a constant size: a memory `sum phi(k) v^T` of finished groups, the
unfinished group's keys and values, and the convolution's window.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.branches import Branches, nothing, plus
from lin_jax.attention.chunks import Chunks
from lin_jax.attention.kernels import fused, fused_commit, fused_verify, is_fused
from lin_jax.attention.layout import Layout
from lin_jax.attention.pairs import PairMasks, per_head
from lin_jax.attention.sequence_parallel import lies_cut, over_sequence
from lin_jax.attention.state import TreePairs, advance
from pallas_kernels.chunks import cut
from pallas_kernels.pairs import merge_heads, split_heads
from pallas_kernels.path_commit.xla import advance_by_path
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.types import QKV, AugmentedState, Nodes, TreeArrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SourceMemory:
    """Memory of an encoder's output, with its keys and values where there is a local branch.

    Attributes:
        memory: `[B, K, M, E]`, or None without a linear branch.
        tokens: `[B, S, K, D]` keys and `[B, S, K, E]` values, or None without a local branch.
        present: `[B, S]` mask of the tokens that are present.
    """

    memory: Float[Array, "*layers B K M E"] | None
    tokens: Nodes | None
    present: Bool[Array, "*layers B S"]


class ComposedAttention(Branches):
    """Branches over queries and keys of `kv_heads` heads, in every form.

    Its arguments are those of `Branches`.
    """

    def init_state(self, batch: int, capacity: int, dtype: Any) -> AugmentedState:
        """The empty state; its size does not depend on `capacity`."""
        del capacity
        slots = (batch, self.group_size, self.kv_heads)
        width = 0 if self.convolution is None else self.convolution.width - 1
        return AugmentedState(
            memory=self._empty_memory(batch, dtype),
            keys=jnp.zeros((*slots, self.head_dim), dtype),
            values=jnp.zeros((*slots, self.value_dim), dtype),
            window=None
            if self.convolution is None
            else jnp.zeros((batch, width, self.kv_heads, self.value_dim), dtype),
            position=jnp.zeros((batch,), jnp.int32),
        )

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: AugmentedState | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B T H E"], AugmentedState | None]:
        """Outputs for whole rows, a group-sized chunk at a time, and the state after them if one was given.

        The first document of a row continues the state; the state returned is that of the row's last document. On a
        mesh with an axis `sequence`, rows without a state lie along it.
        """
        if state is None and lies_cut(layout, self.group_size):
            return over_sequence(self, qkv, layout, bias), None
        if layout.present is None and is_fused(self, bias):
            outputs, memory = fused(self, qkv, layout, state)
            if state is None or layout.continued:
                return outputs, None
            # What the state keeps are keys as they are scored.
            keys = self.scored(qkv.keys)
            return outputs, advance(state, keys, qkv.values, layout, None if self.linear is None else memory)
        queries, keys, values = self._inputs(qkv)
        rows = Chunks.of(queries, keys, values, layout, state, self.group_size)
        direct, sums = self._pairs(
            rows.queries, rows.window_keys, rows.window_values, *self._reach(rows.masks), rows.bias(bias)
        )
        after = None
        if self.linear is not None:
            initial = self._empty_memory(keys.shape[0], keys.dtype) if state is None else state.memory
            assert initial is not None, "there is a linear branch"
            whole = state is not None and not layout.continued
            before, after = rows.memories(initial, self.fold, whole=whole)
            read = self.linear.recall(rows.queries, before)
            sums = plus(sums, jnp.where(rows.reads_memory[..., None, None, None], read, 0))
        outputs = rows.flatten(self._outputs(direct, sums))
        outputs = self._combined(outputs, values)
        if self.convolution is not None:
            outputs = outputs + self.convolution.parallel(values, layout, None if state is None else state.window)
        new_state = None if state is None or layout.continued else advance(state, keys, values, layout, after)
        return merge_heads(outputs).astype(values.dtype), new_state

    def verify(
        self,
        qkv: QKV,
        tree: TreeArrays,
        state: AugmentedState,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B N H E"], Nodes]:
        """Outputs for the nodes of a tree on top of the state, exact across group boundaries.

        The pairs are (node, token of the unfinished group) and (node, ancestor or itself); whatever lies in an earlier
        group than the node scores through the linear branch, although it has not been folded into the memory.
        """
        if is_fused(self, bias):
            # What the state keeps are keys as they are scored.
            nodes = Nodes(self.scored(qkv.keys), qkv.values)
            return fused_verify(self, qkv, tree, state), nodes
        queries, keys, values = self._inputs(qkv)
        nodes = Nodes(keys, values)
        pairs = TreePairs.of(state, nodes, tree)
        between = None if bias is None else per_head(bias.between(pairs.positions, pairs.key_positions), self.kv_heads)
        direct, sums = self._pairs(queries, pairs.keys, pairs.values, *self._reach(pairs.masks), between)
        if self.linear is not None and state.memory is not None:
            sums = plus(sums, self.linear.recall(queries, state.memory))
        outputs = self._combined(self._outputs(direct, sums), values)
        if self.convolution is not None and state.window is not None:
            outputs = outputs + self.convolution.verify(values, tree.depth, tree.ancestors, state.window)
        return merge_heads(outputs).astype(values.dtype), nodes

    def commit(self, state: AugmentedState, path: Nodes, length: Int[Array, " B"]) -> AugmentedState:
        """The state after the first `length` (at most G) nodes of the path, row by row."""
        if state.memory is not None and is_fused(self, None):
            return fused_commit(self, state, path, length)
        return advance_by_path(state, path, length, self.fold)

    def bidirectional(self, qkv: QKV, layout: Layout, bias: RelativeBias | None = None) -> Float[Array, "B T H E"]:
        """Outputs for an encoder's rows: the local branch over whole groups, the linear one over the whole document.

        Rows that hold several documents are scored as one matrix of pairs.
        """
        queries, keys, values = self._inputs(qkv)
        if self.mean is not None and self.linear is not None:
            start = self.linear.features.start
            mean = queries[..., start:] / self._lengths(layout)[..., None, None, None].astype(queries.dtype)
            queries = jnp.concatenate([queries[..., :start], mean], axis=-1)
        if layout.aligned:
            outputs = self._aligned_rows(queries, keys, values, layout, bias)
        else:
            group = layout.positions // self.group_size
            same = layout.pairs & (group[:, :, None] == group[:, None, :])
            between = None
            if bias is not None:
                between = per_head(bias.between(layout.positions, layout.positions), self.kv_heads)
            outputs = self._outputs(*self._pairs(queries, keys, values, same, layout.pairs, between))
        outputs = self._combined(outputs, values)
        if self.convolution is not None:
            outputs = outputs + self.convolution.bidirectional(values, layout)
        return merge_heads(outputs).astype(values.dtype)

    def condense(self, keys: Float[Array, "B S K D"], values: Float[Array, "B S K E"], layout: Layout) -> SourceMemory:
        """Sums an encoder's output up; a local branch keeps all of it, so that the memory grows with the source."""
        keys = self.scored(keys)
        memory = None if self.linear is None else self._source(keys, values, layout)
        return SourceMemory(memory, None if self.local is None else Nodes(keys, values), layout.valid)

    def read(
        self, queries: Float[Array, "B T H D"], positions: Int[Array, "B T"], memory: SourceMemory
    ) -> Float[Array, "B T H E"]:
        """Outputs for a decoder's queries; the local branch reads the source's group of the same number."""
        queries = split_heads(self.scored(queries), self.kv_heads)
        direct = None
        if self.local is not None and memory.tokens is not None:
            group = positions[:, :, None] // self.group_size
            same = (group == jnp.arange(memory.present.shape[1]) // self.group_size) & memory.present[:, None, :]
            direct, _ = self._pairs(queries, memory.tokens.keys, memory.tokens.values, same, None, None)
        sums = None
        if self.linear is not None and memory.memory is not None:
            sums = self.linear.recall(queries, memory.memory)
        outputs = self._merged(self._outputs(direct, sums))
        return merge_heads(outputs).astype(queries.dtype)

    def _aligned_rows(
        self, queries: Array, keys: Array, values: Array, layout: Layout, bias: RelativeBias | None
    ) -> Float[Array, "B T K R E"]:
        size, direct, sums = self.group_size, None, None
        if self.local is not None:
            groups = cut(queries, size), cut(keys, size), cut(values, size)
            mask = jnp.broadcast_to(cut(layout.valid, size)[:, :, None], (*groups[0].shape[:3], size))
            order = jnp.arange(size)
            between = None if bias is None else per_head(bias.between(order, order), self.kv_heads)
            local, _ = self._pairs(*groups, mask, None, between)
            assert local is not None
            direct = local.reshape(local.shape[0], -1, *local.shape[3:])[:, : keys.shape[1]]
        if self.linear is not None:
            sums = self.linear.recall(queries, self._source(keys, values, layout))
        if self.local is None and self.linear is None:
            direct = nothing(queries, values)
        return self._outputs(direct, sums)

    def _lengths(self, layout: Layout) -> Int[Array, "#B #T"]:
        """Divisors of the mean over an encoder's row: the row's length, or the present tokens of each document."""
        if self.mean == "row":
            return jnp.full((1, 1), layout.positions.shape[1])
        present = jnp.sum(layout.valid, axis=1, keepdims=True) if layout.aligned else jnp.sum(layout.pairs, axis=2)
        return jnp.maximum(present, 1)

    def _source(self, keys: Array, values: Array, layout: Layout) -> Array:
        """The memory of whole rows."""
        # Without the barrier, XLA on CPU merges this product with the reading of it into one that it lacks in bfloat16.
        return jax.lax.optimization_barrier(self.fold(keys, values, layout.valid))

    def _reach(self, masks: PairMasks) -> tuple[Array, Array | None]:
        """The pairs of the local branch, and those of the linear one."""
        if self.linear is None or self.linear.reach == "earlier":
            return masks.same_group, masks.earlier_group
        return (
            masks.same_group,
            masks.same_group if masks.earlier_group is None else masks.same_group | masks.earlier_group,
        )

    def _empty_memory(self, batch: int, dtype: Any) -> Array | None:
        if self.linear is None:
            return None
        width = self.value_dim + self.linear.normalised
        return jnp.zeros((batch, self.kv_heads, self.linear.features.size, width), accumulation_dtype(dtype))
