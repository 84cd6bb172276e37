"""Attention over all pairs: softmax, the baseline (Vaswani et al. 2017), and FLASH's squared ReLU (Hua et al. 2022).

Recurrence: none; the state is a preallocated cache of `C (D + E)` numbers per key/value head and sequence of at most C
tokens. `softmax`: `o_t = sum_s softmax_s(c q_t·k_s + b_ts) v_s`. `square`: `o_t = sum_s relu(q_t·k_s)^2 v_s / n` over
unit queries and keys, n the number of tokens that the query sees; in FLASH
`o_t = sum_s relu((q_t·k_s / n + b_ts) / n)^2 v_s`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.config import Conventions
from lin_jax.attention.layout import Layout
from lin_jax.attention.local import relu_squared
from lin_jax.attention.pairs import unit
from lin_jax.attention.softmax_cache import softmax_of_cache, suits_blocks
from lin_jax.attention.softmax_rows import softmax_rows, suits_rows
from lin_jax.errors import UserError
from pallas_kernels.implementations import choose_implementation, target_platform
from pallas_kernels.pairs import merge_heads, pair_scores, split_heads, weighted_values
from pallas_kernels.types import QKV, Nodes, TreeArrays

# What cuDNN takes on every GPU that has FlashAttention at all.
CUDNN_TYPES = ("bfloat16", "float16")
CUDNN_HEAD = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheState:
    """Decode state of attention over all pairs: keys and values of all tokens so far, in slots for a capacity.

    Attributes:
        keys: `[B, C, K, D]`, position p in slot p.
        values: `[B, C, K, E]`.
        position: `[B]` tokens consumed so far.
    """

    keys: Float[Array, "*layers B C K D"]
    values: Float[Array, "*layers B C K E"]
    position: Int[Array, "*layers B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SourceCache:
    """An encoder's keys `[B, S, K, D]` and values `[B, S, K, E]`, and the mask `[B, S]` of those present."""

    keys: Float[Array, "*layers B S K D"]
    values: Float[Array, "*layers B S K E"]
    present: Bool[Array, "*layers B S"]


class FullAttention(nnx.Module):
    """Attention over all pairs, in every form.

    Args:
        kv_heads: key/value heads K.
        head_dim: size D of queries and keys.
        value_dim: size E of values.
        weights: function from scores to weights.
        conventions: scale and length.
        implementation: of the softmax over whole rows, as in `causal_softmax`.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        weights: Literal["softmax", "square"],
        conventions: Conventions,
        implementation: str | None = None,
    ) -> None:
        self.kv_heads, self.head_dim, self.value_dim = kv_heads, head_dim, value_dim
        self.weights = weights
        self.conventions = conventions
        self.implementation = implementation

    def init_state(self, batch: int, capacity: int, dtype: Any) -> CacheState:
        """An empty cache for `capacity` tokens per sequence."""
        self._refuse_row_length()
        shape = (batch, capacity, self.kv_heads)
        return CacheState(
            jnp.zeros((*shape, self.head_dim), dtype),
            jnp.zeros((*shape, self.value_dim), dtype),
            jnp.zeros((batch,), jnp.int32),
        )

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: CacheState | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B T H E"], CacheState | None]:
        """Outputs for whole rows. From a state, rows are one document each, padded on the right."""
        if state is not None:
            return self._from_cache(qkv, layout, state, bias)
        whole = layout.aligned and layout.present is None
        if whole and bias is None and self.weights == "softmax" and self.conventions.softmax_scale != "length":
            return causal_softmax(*qkv, self._scale, self.implementation), None
        length = qkv.keys.shape[1]
        lengths = self._lengths(length, layout.positions + 1)
        added = None if bias is None else bias.between(layout.positions, layout.positions)
        if self.weights == "softmax" and suits_rows(qkv):
            pairs = None if whole else layout.pairs
            return softmax_rows(self._divided(qkv, lengths), pairs, added, self._scale, causal=True), None
        mask = jnp.tri(length, dtype=bool)[None]
        if not whole:
            mask = mask & layout.pairs
        return self._attend(qkv, mask, added, lengths), None

    def verify(
        self,
        qkv: QKV,
        tree: TreeArrays,
        state: CacheState,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B N H E"], Nodes]:
        """Outputs for the nodes of a tree on top of the cache."""
        queries, keys, values = qkv
        batch, count = keys.shape[:2]
        cache = QKV(queries, state.keys, state.values)
        if self._in_blocks(cache, bias):
            used = jnp.broadcast_to(state.position[:, None], (batch, count))
            ancestors = jnp.broadcast_to(tree.ancestors, (batch, count, count))
            return softmax_of_cache(cache, used, self._scale, (keys, values, ancestors)), Nodes(keys, values)
        slots = jnp.arange(state.keys.shape[1])
        cached = slots < state.position[:, None]
        mask = jnp.concatenate(
            [
                jnp.broadcast_to(cached[:, None], (batch, count, slots.size)),
                jnp.broadcast_to(tree.ancestors, (batch, count, count)),
            ],
            axis=2,
        )
        all_keys = jnp.concatenate([state.keys.astype(keys.dtype), keys], axis=1)
        all_values = jnp.concatenate([state.values.astype(values.dtype), values], axis=1)
        positions = state.position[:, None] + tree.depth
        key_positions = jnp.concatenate([jnp.broadcast_to(slots, (batch, slots.size)), positions], axis=1)
        added = None if bias is None else bias.between(positions, key_positions)
        return self._attend(QKV(queries, all_keys, all_values), mask, added, positions + 1), Nodes(keys, values)

    def commit(self, state: CacheState, path: Nodes, length: Int[Array, " B"]) -> CacheState:
        """The cache with the first `length` nodes of the path written behind it, row by row."""

        def write(cache: Array, new: Array) -> Array:
            slot = state.position[:, None] + jnp.arange(new.shape[1])
            slot = jnp.where(jnp.arange(new.shape[1]) < length[:, None], slot, cache.shape[1])
            rows = jnp.arange(cache.shape[0])[:, None]
            return cache.at[rows, slot].set(new.astype(cache.dtype), mode="drop")

        position = state.position + length.astype(state.position.dtype)
        return CacheState(write(state.keys, path.keys), write(state.values, path.values), position)

    def bidirectional(self, qkv: QKV, layout: Layout, bias: RelativeBias | None = None) -> Float[Array, "B T H E"]:
        """Outputs for an encoder's rows."""
        mask = layout.pairs
        lengths = self._lengths(qkv.keys.shape[1], jnp.sum(mask, axis=-1))
        added = None if bias is None else bias.between(layout.positions, layout.positions)
        if self.weights == "softmax" and suits_rows(qkv):
            return softmax_rows(self._divided(qkv, lengths), mask, added, self._scale, causal=False)
        return self._attend(qkv, mask, added, lengths)

    def condense(self, keys: Float[Array, "B S K D"], values: Float[Array, "B S K E"], layout: Layout) -> SourceCache:
        """Keeps an encoder's keys and values as they are."""
        return SourceCache(keys, values, layout.valid)

    def read(
        self, queries: Float[Array, "B T H D"], positions: Int[Array, "B T"], memory: SourceCache
    ) -> Float[Array, "B T H E"]:
        """Outputs for a decoder's queries; their positions do not matter."""
        mask = jnp.broadcast_to(memory.present[:, None, :], (*positions.shape, memory.present.shape[1]))
        lengths = self._lengths(memory.keys.shape[1], jnp.sum(mask, axis=-1))
        return self._attend(QKV(queries, memory.keys, memory.values), mask, None, lengths)

    def _from_cache(
        self, qkv: QKV, layout: Layout, state: CacheState, bias: RelativeBias | None
    ) -> tuple[Array, CacheState]:
        queries, keys, values = qkv
        state = self.commit(state, Nodes(keys, values), layout.lengths)
        cache = QKV(queries, state.keys, state.values)
        if self._in_blocks(cache, bias):
            return softmax_of_cache(cache, layout.positions + 1, self._scale), state
        slots = jnp.arange(state.keys.shape[1])
        mask = slots <= layout.positions[..., None]
        added = None if bias is None else bias.between(layout.positions, jnp.broadcast_to(slots, (1, slots.size)))
        cached = QKV(queries, state.keys.astype(keys.dtype), state.values.astype(values.dtype))
        return self._attend(cached, mask, added, layout.positions + 1), state

    def _in_blocks(self, cache: QKV, bias: RelativeBias | None) -> bool:
        """True where a cache is read block by block."""
        plain = self.weights == "softmax" and self.conventions.softmax_scale != "length"
        return plain and bias is None and suits_blocks(cache)

    @property
    def _scale(self) -> float:
        """Factor of softmax scores, but for the length."""
        return self.head_dim**-0.5 if self.conventions.softmax_scale == "root" else 1.0

    def _lengths(self, row: int, seen: Int[Array, "#B T"]) -> Int[Array, "#B T"]:
        """Lengths by which each query's scores may be divided."""
        return jnp.full_like(seen, row) if self.conventions.length == "row" else jnp.maximum(seen, 1)

    def _divided(self, qkv: QKV, lengths: Int[Array, "#B T"]) -> QKV:
        """Queries divided by their lengths, where softmax's scores are to be."""
        if self.conventions.softmax_scale != "length":
            return qkv
        return qkv._replace(queries=qkv.queries / lengths[:, :, None, None].astype(qkv.queries.dtype))

    def _attend(
        self,
        qkv: QKV,
        mask: Bool[Array, "#B T S"],
        bias: Float[Array, "#B H T S"] | None,
        lengths: Int[Array, "#B T"],
    ) -> Float[Array, "B T H E"]:
        """Outputs over the pairs that the mask allows; keys and values may be of other tokens than queries."""
        queries, keys, values = qkv
        if self.weights == "softmax":
            return masked_softmax(*self._divided(qkv, lengths), mask, bias, self._scale)
        divisors = lengths[:, :, None, None].astype(queries.dtype)
        if self.conventions.unit:
            return _squared(unit(queries), unit(keys), values, mask, bias) / divisors
        inner = None if bias is None else bias / lengths[:, None, :, None].astype(bias.dtype)
        return _squared(queries / jnp.square(divisors), keys, values, mask, inner)

    def _refuse_row_length(self) -> None:
        by_length = self.weights == "square" or self.conventions.softmax_scale == "length"
        if by_length and self.conventions.length == "row":
            raise UserError(
                "scores are divided by the row's length, which decoding does not know; set length_scale to 'position'"
            )


def _squared(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B S K D"],
    values: Float[Array, "B S K E"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None,
) -> Float[Array, "B T H E"]:
    scores = pair_scores(split_heads(queries, keys.shape[2]), keys)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], *scores.shape[1:])
    weights = jnp.where(mask[:, None, None], relu_squared(scores), 0)
    return merge_heads(weighted_values(weights, values)).astype(values.dtype)


def causal_softmax(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K E"],
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T H E"]:
    """Outputs of whole rows, each one document from position 0; H is a multiple of K.

    Args:
        queries: `[B, T, H, D]`.
        keys: `[B, T, K, D]`.
        values: `[B, T, K, E]`.
        scale: factor of the scores.
        implementation: `xla` for plain XLA; anything else takes cuDNN where there is a GPU, and XLA for what it cannot.
    """
    asked = ("cudnn", "xla") if implementation != "xla" and target_platform() == "gpu" else "xla"
    if choose_implementation("softmax attention", asked, {"cudnn": _obstacle(keys, values), "xla": None}) == "xla":
        if suits_rows(QKV(queries, keys, values)):
            return softmax_rows(QKV(queries, keys, values), None, None, scale, causal=True)
        mask = jnp.tri(keys.shape[1], dtype=bool)[None]
        return masked_softmax(queries, keys, values, mask, None, scale)
    return jax.nn.dot_product_attention(queries, keys, values, scale=scale, is_causal=True, implementation="cudnn")


def _obstacle(keys: Float[Array, "B T K D"], values: Float[Array, "B T K E"]) -> str | None:
    """The reason why cuDNN cannot take such rows, None if it can."""
    length, size = keys.shape[1], keys.shape[3]
    if keys.dtype.name not in CUDNN_TYPES or values.dtype != keys.dtype:
        return f"keys are {keys.dtype} and values {values.dtype}, not {' or '.join(CUDNN_TYPES)}"
    if values.shape[3] != size or size % 8 or size > CUDNN_HEAD:
        return f"heads of {size} and {values.shape[3]} are not a multiple of 8 up to {CUDNN_HEAD}, the same for both"
    return f"rows of {length} tokens are of an odd length" if length % 2 else None


def masked_softmax(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B S K D"],
    values: Float[Array, "B S K E"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None,
    scale: float,
) -> Float[Array, "B T H E"]:
    """Outputs over the pairs that a mask allows, in plain XLA."""
    if queries.dtype != jnp.float64 and values.shape[-1] == keys.shape[-1]:
        return jax.nn.dot_product_attention(queries, keys, values, bias, mask[:, None], scale=scale)
    # JAX's own function takes the softmax in float32 whatever it is given, and has one size for keys and values.
    scores = pair_scores(split_heads(queries, keys.shape[2]), keys) * scale
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], *scores.shape[1:])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    return merge_heads(weighted_values(jax.nn.softmax(scores), values)).astype(values.dtype)
