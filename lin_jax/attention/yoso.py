"""YOSO (Zeng et al. 2021): Bernoulli sampling of attention by locality-sensitive hashing.

Training and encoding: the expectation `o_t = unit(sum_s (1 - arccos(q_t·k_s) / pi)^tau v_s)` of unit queries and keys,
as one matrix of pairs. From a state (prefill, decoding, speculation): m hash tables stand for the sum, `o_t =
unit(sum_{s<=t} share of tables in which q_t and k_s collide, times v_s)`. State: tables `[K, m 2^tau, E]` and the
unfinished group.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.composition import ComposedAttention
from lin_jax.attention.layout import Layout
from lin_jax.attention.pairs import unit
from pallas_kernels.pairs import merge_heads, pair_scores, split_heads, weighted_values
from pallas_kernels.types import QKV, AugmentedState, Nodes, TreeArrays


class YosoAttention(nnx.Module):
    """The expectation without a state, hash tables with one.

    Args:
        tables: linear attention whose features are `feature_maps.HashCollisions`.
        bits: bits tau of a hash.
    """

    def __init__(self, tables: ComposedAttention, bits: int) -> None:
        self.tables = tables
        self.bits = bits

    def init_state(self, batch: int, capacity: int, dtype: Any) -> AugmentedState:
        """Empty hash tables."""
        return self.tables.init_state(batch, capacity, dtype)

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: AugmentedState | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, AugmentedState | None]:
        """Outputs for whole rows: expected without a state, from hash tables with one."""
        if state is not None:
            return self.tables.parallel(qkv, layout, state)
        causal = jnp.tri(qkv.keys.shape[1], dtype=bool)
        return self._expected(qkv, causal & layout.pairs), None

    def verify(
        self,
        qkv: QKV,
        tree: TreeArrays,
        state: AugmentedState,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, Nodes]:
        """Outputs for the nodes of a tree, from hash tables."""
        return self.tables.verify(qkv, tree, state)

    def commit(self, state: AugmentedState, path: Nodes, length: Int[Array, " B"]) -> AugmentedState:
        """Hash tables after the first `length` nodes of the path."""
        return self.tables.commit(state, path, length)

    def bidirectional(self, qkv: QKV, layout: Layout, bias: RelativeBias | None = None) -> Array:
        """Expected outputs for an encoder's rows."""
        return self._expected(qkv, layout.pairs)

    def _expected(self, qkv: QKV, mask: Array) -> Float[Array, "B T H E"]:
        queries, keys, values = qkv
        scores = pair_scores(split_heads(unit(queries), keys.shape[2]), unit(keys))
        weights = jnp.where(mask[:, None, None], collision_probability(scores, self.bits), 0)
        return merge_heads(unit(weighted_values(weights, values))).astype(values.dtype)


def collision_probability(cosines: Float[Array, "*pairs"], bits: int) -> Float[Array, "*pairs"]:
    """The chance that unit vectors at given cosines agree in `bits` random signs; its slope is kept finite at one."""
    return (1 - jnp.arccos(jnp.clip(cosines, -1 + 1e-6, 1 - 1e-6)) / jnp.pi) ** bits
