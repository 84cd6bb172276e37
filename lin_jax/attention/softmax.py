"""Softmax attention, the baseline (Vaswani et al. 2017), with a preallocated cache as its state."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.layout import Layout
from lin_jax.attention.mixer import Nodes
from lin_jax.attention.pairs import merge_heads, pair_scores, split_heads, weighted_values
from lin_jax.attention.tree import TreeArrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheState:
    """Keys and values of all tokens so far; its size is fixed by the capacity, not by a constant of the method.

    Attributes:
        keys: `[B, C, K, D]`, position p in slot p.
        values: `[B, C, K, E]`.
        position: `[B]` tokens consumed so far.
    """

    keys: Float[Array, "*layers B C K D"]
    values: Float[Array, "*layers B C K E"]
    position: Int[Array, "*layers B"]


class SoftmaxAttention(nnx.Module):
    """Causal softmax attention with scores `q·k / sqrt(D)`."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self.kv_heads = kv_heads
        self.head_dim = head_dim

    def init_state(self, batch: int, capacity: int, dtype: Any) -> CacheState:
        """An empty cache for `capacity` tokens per sequence."""
        shape = (batch, capacity, self.kv_heads, self.head_dim)
        return CacheState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))

    def parallel(
        self,
        queries: Float[Array, "B T H D"],
        keys: Float[Array, "B T K D"],
        values: Float[Array, "B T K E"],
        layout: Layout,
        state: CacheState | None = None,
    ) -> tuple[Float[Array, "B T H E"], CacheState | None]:
        """Outputs for whole rows. From a state, rows are one document each, padded on the right."""
        if state is None:
            order = jnp.arange(keys.shape[1])
            mask = order[:, None] >= order
            if not layout.aligned:
                together = layout.documents[:, :, None] == layout.documents[:, None, :]
                mask = mask & together & layout.valid[:, None, :]
            return _attend(queries, keys, values, mask), None
        state = self.commit(state, Nodes(keys, values), layout.lengths)
        mask = jnp.arange(state.keys.shape[1]) <= layout.positions[..., None]
        cached = (state.keys.astype(keys.dtype), state.values.astype(values.dtype))
        return _attend(queries, *cached, mask), state

    def verify(
        self,
        queries: Float[Array, "B N H D"],
        keys: Float[Array, "B N K D"],
        values: Float[Array, "B N K E"],
        tree: TreeArrays,
        state: CacheState,
    ) -> tuple[Float[Array, "B N H E"], Nodes]:
        """Outputs for the nodes of a tree on top of the cache."""
        batch, count = keys.shape[:2]
        capacity = state.keys.shape[1]
        cached = jnp.arange(capacity) < state.position[:, None]
        mask = jnp.concatenate(
            [
                jnp.broadcast_to(cached[:, None], (batch, count, capacity)),
                jnp.broadcast_to(tree.ancestors, (batch, count, count)),
            ],
            axis=2,
        )
        all_keys = jnp.concatenate([state.keys.astype(keys.dtype), keys], axis=1)
        all_values = jnp.concatenate([state.values.astype(values.dtype), values], axis=1)
        return _attend(queries, all_keys, all_values, mask), Nodes(keys, values)

    def commit(self, state: CacheState, path: Nodes, length: Int[Array, " B"]) -> CacheState:
        """The cache with the first `length` nodes of the path written behind it, row by row."""

        def write(cache: Array, new: Array) -> Array:
            slot = state.position[:, None] + jnp.arange(new.shape[1])
            slot = jnp.where(jnp.arange(new.shape[1]) < length[:, None], slot, cache.shape[1])
            rows = jnp.arange(cache.shape[0])[:, None]
            return cache.at[rows, slot].set(new.astype(cache.dtype), mode="drop")

        position = state.position + length.astype(state.position.dtype)
        return CacheState(write(state.keys, path.keys), write(state.values, path.values), position)


def _attend(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B S K D"],
    values: Float[Array, "B S K E"],
    mask: Bool[Array, "*#B T S"],
) -> Float[Array, "B T H E"]:
    """Softmax attention over the pairs that the mask allows."""
    if queries.dtype != jnp.float64:
        per_head = mask[None, None] if mask.ndim == 2 else mask[:, None]
        return jax.nn.dot_product_attention(queries, keys, values, mask=per_head)
    # JAX's own function takes the softmax in float32 whatever it is given.
    scores = pair_scores(split_heads(queries, keys.shape[2]), keys) / math.sqrt(queries.shape[-1])
    scores = jnp.where(mask[..., None, None, :, :], scores, jnp.finfo(scores.dtype).min)
    return merge_heads(weighted_values(jax.nn.softmax(scores), values))
