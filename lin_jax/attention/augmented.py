"""Augmented linear attention: local + alpha * grouped + convolution (You et al., ICML 2024), from its small parts.

Every part may be left out, so this one composition is also plain local and plain grouped attention. The recurrence
and the three forms are those of `mixer.TokenMixer`; the state has a constant size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention.chunks import Chunks
from lin_jax.attention.convolution import MaskedConvolution
from lin_jax.attention.grouped import recall
from lin_jax.attention.layout import Layout
from lin_jax.attention.local import ScoreFunction, local_weights
from lin_jax.attention.mixer import Nodes
from lin_jax.attention.pairs import (
    PairMasks,
    accumulation_dtype,
    causal_masks,
    merge_heads,
    pair_scores,
    split_heads,
    weighted_values,
)
from lin_jax.attention.state import AugmentedState, advance, commit_path
from lin_jax.attention.tree import TreeArrays


class AugmentedAttention(nnx.Module):
    """Local, grouped and convolution branches over unit queries and keys, each of them optional.

    Args:
        heads: query heads H.
        kv_heads: key/value heads K.
        head_dim: size D of queries, keys and values.
        group_size: tokens in a group.
        local: score function of the local branch, or None.
        grouped: whether there is a grouped branch.
        kernel_size: size of the masked convolution's kernel, or None.
        initial_alpha: start of the grouped branch's learnt factor.
        param_dtype: type of the parameters.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        group_size: int,
        local: ScoreFunction | None,
        grouped: bool,
        kernel_size: int | None,
        initial_alpha: float = 0.0,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.group_size = group_size
        self.local = local
        self.alpha = nnx.Param(jnp.full((1,), initial_alpha, param_dtype)) if grouped else None
        self.convolution = (
            None if kernel_size is None else MaskedConvolution(kernel_size, heads, kv_heads, param_dtype=param_dtype)
        )

    def init_state(self, batch: int, capacity: int, dtype: Any) -> AugmentedState:
        """The empty state; its size does not depend on `capacity`."""
        del capacity
        slots = (batch, self.group_size, self.kv_heads, self.head_dim)
        memory = (batch, self.kv_heads, self.head_dim, self.head_dim)
        width = 0 if self.convolution is None else self.convolution.width - 1
        return AugmentedState(
            memory=None if self.alpha is None else jnp.zeros(memory, accumulation_dtype(dtype)),
            keys=jnp.zeros(slots, dtype),
            values=jnp.zeros(slots, dtype),
            window=None if self.convolution is None else jnp.zeros((batch, width, self.kv_heads, self.head_dim), dtype),
            position=jnp.zeros((batch,), jnp.int32),
        )

    def parallel(
        self,
        queries: Float[Array, "B T H D"],
        keys: Float[Array, "B T K D"],
        values: Float[Array, "B T K E"],
        layout: Layout,
        state: AugmentedState | None = None,
    ) -> tuple[Float[Array, "B T H E"], AugmentedState | None]:
        """Outputs for whole rows, a group-sized chunk at a time, and the state after them if one was given.

        The first document of a row continues the state; the state returned is that of the row's last document.
        """
        queries, keys = split_heads(unit(queries), self.kv_heads), unit(keys)
        rows = Chunks.of(queries, keys, values, layout, state, self.group_size)
        outputs = self._attend(rows.queries, rows.window_keys, rows.window_values, rows.masks)
        after = None
        if self.alpha is not None:
            initial = self._memory_or_zeros(state, keys, values)
            before, after = rows.memories(initial, whole=state is not None)
            read = recall(rows.queries, before)
            outputs = outputs + self._alpha(read) * jnp.where(rows.reads_memory[..., None, None, None], read, 0)
        outputs = rows.flatten(outputs)
        if self.convolution is not None:
            outputs = outputs + self.convolution.parallel(values, layout, None if state is None else state.window)
        new_state = None if state is None else advance(state, keys, values, layout, after)
        return merge_heads(outputs).astype(values.dtype), new_state

    def verify(
        self,
        queries: Float[Array, "B N H D"],
        keys: Float[Array, "B N K D"],
        values: Float[Array, "B N K E"],
        tree: TreeArrays,
        state: AugmentedState,
    ) -> tuple[Float[Array, "B N H E"], Nodes]:
        """Outputs for the nodes of a tree on top of the state, exact across group boundaries.

        The pairs are (node, token of the unfinished group) and (node, ancestor or itself); whatever lies in an earlier
        group than the node scores through the grouped branch, although it has not been folded into the memory.
        """
        queries, keys = split_heads(unit(queries), self.kv_heads), unit(keys)
        nodes = Nodes(keys, values)
        start = state.position // self.group_size * self.group_size
        slots = start[:, None] + jnp.arange(self.group_size)
        node_positions = state.position[:, None] + tree.depth
        buffered = jnp.broadcast_to(
            (slots < state.position[:, None])[:, None], (*node_positions.shape, self.group_size)
        )
        ancestors = jnp.broadcast_to(tree.ancestors, (*node_positions.shape, tree.ancestors.shape[-1]))
        masks = causal_masks(
            node_positions,
            jnp.concatenate([slots, node_positions], axis=1),
            self.group_size,
            jnp.concatenate([buffered, ancestors], axis=2),
        )
        all_keys = jnp.concatenate([state.keys.astype(keys.dtype), keys], axis=1)
        all_values = jnp.concatenate([state.values.astype(values.dtype), values], axis=1)
        outputs = self._attend(queries, all_keys, all_values, masks)
        if state.memory is not None:
            read = recall(queries, state.memory)
            outputs = outputs + self._alpha(read) * read
        if self.convolution is not None and state.window is not None:
            outputs = outputs + self.convolution.verify(values, tree.depth, tree.ancestors, state.window)
        return merge_heads(outputs).astype(values.dtype), nodes

    def commit(self, state: AugmentedState, path: Nodes, length: Int[Array, " B"]) -> AugmentedState:
        """The state after the first `length` (at most G) nodes of the path, row by row."""
        return commit_path(state, path, length)

    def _attend(self, queries: Array, keys: Array, values: Array, masks: PairMasks) -> Float[Array, "*batch T K R E"]:
        """Both branches over explicit pairs: one score matrix, one product with the values."""
        scores = pair_scores(queries, keys)
        weights = jnp.zeros_like(scores)
        if self.local is not None:
            weights = weights + local_weights(scores, masks.same_group, self.local)
        if self.alpha is not None and masks.earlier_group is not None:
            weights = weights + self._alpha(scores) * jnp.where(masks.earlier_group[..., None, None, :, :], scores, 0)
        return weighted_values(weights, values)

    def _alpha(self, like: Array) -> Array:
        assert self.alpha is not None
        return self.alpha[...].astype(like.dtype)

    def _memory_or_zeros(self, state: AugmentedState | None, keys: Array, values: Array) -> Array:
        if state is not None and state.memory is not None:
            return state.memory
        shape = (keys.shape[0], self.kv_heads, keys.shape[-1], values.shape[-1])
        return jnp.zeros(shape, accumulation_dtype(keys.dtype))


def unit(vectors: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Vectors scaled to length one over the last axis; a zero vector stays zero and has a zero gradient."""
    wide = vectors.astype(accumulation_dtype(vectors.dtype))
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    scale = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    return (wide * scale).astype(vectors.dtype)
