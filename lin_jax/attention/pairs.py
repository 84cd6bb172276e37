"""Scores and weighted sums over (query, key) pairs, with grouped-query heads, and masks of pairs.

Throughout, query heads are split into `K` key/value heads times `R` queries that share one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.precision import upcast


class PairMasks(NamedTuple):
    """Masks of the (query, key) pairs of a causal sequence, one for each branch."""

    same_group: Bool[Array, "*batch T S"]
    """Key not after the query, in the same document and the same group: the local branch."""
    earlier_group: Bool[Array, "*batch T S"] | None
    """Key of the same document in a group before the query's: the grouped branch. None where there is no such pair."""


def per_head(bias: Float[Array, "*batch H T S"], kv_heads: int) -> Float[Array, "*batch K R T S"]:
    """Splits the head axis of a bias like `split_heads` does that of queries."""
    *lead, heads, rows, columns = bias.shape
    return bias.reshape(*lead, kv_heads, heads // kv_heads, rows, columns)


def causal_masks(
    query_positions: Int[Array, "*batch T"],
    key_positions: Int[Array, "*batch S"],
    group_size: int,
    together: Bool[Array, "*batch T S"],
) -> PairMasks:
    """The masks of pairs that are `together` (same document, no padding), by absolute position."""
    query, key = query_positions[..., :, None], key_positions[..., None, :]
    same = query // group_size == key // group_size
    return PairMasks(together & same & (key <= query), together & (key // group_size < query // group_size))


def unit(vectors: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Vectors scaled to length one over the last axis; a zero vector stays zero and has a zero gradient."""
    wide = upcast(vectors)
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    scale = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    return (wide * scale).astype(vectors.dtype)
