"""Scores and weighted sums over (query, key) pairs, and sums `k v^T` that queries read, with grouped-query heads.

Throughout, query heads are split into `K` key/value heads times `R` queries that share one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.precision import accumulation_dtype

# State products are taken in full float32: on TPU the default would round the memory to bfloat16.
EXACT = jax.lax.Precision.HIGHEST


def split_heads(queries: Float[Array, "*batch T H D"], kv_heads: int) -> Float[Array, "*batch T K R D"]:
    """Splits query heads into key/value heads times the queries that share one."""
    *lead, heads, size = queries.shape
    return queries.reshape(*lead, kv_heads, heads // kv_heads, size)


def merge_heads(outputs: Float[Array, "*batch T K R D"]) -> Float[Array, "*batch T H D"]:
    """The inverse of `split_heads`."""
    *lead, kv_heads, share, size = outputs.shape
    return outputs.reshape(*lead, kv_heads * share, size)


def pair_scores(
    queries: Float[Array, "*batch T K R D"], keys: Float[Array, "*batch S K D"]
) -> Float[Array, "*batch K R T S"]:
    """Inner products of queries and keys, accumulated in float32 or better."""
    return jnp.einsum(
        "...tkrd,...skd->...krts", queries, keys, preferred_element_type=accumulation_dtype(queries.dtype)
    )


def weighted_values(
    weights: Float[Array, "*batch K R T S"], values: Float[Array, "*batch S K E"]
) -> Float[Array, "*batch T K R E"]:
    """Sums of values under the given weights, accumulated in float32 or better."""
    return jnp.einsum(
        "...ske,...krts->...tkre",
        values,
        weights.astype(values.dtype),
        preferred_element_type=accumulation_dtype(values.dtype),
    )


def fold(
    keys: Float[Array, "*batch S K D"],
    values: Float[Array, "*batch S K E"],
    included: Bool[Array, "*#batch S"] | None = None,
) -> Float[Array, "*batch K D E"]:
    """A group's addition to the memory: `sum k v^T` over its (included) tokens, in float32 or better."""
    if included is not None:
        keys = jnp.where(included[..., None, None], keys, 0)
        values = jnp.where(included[..., None, None], values, 0)
    return jnp.einsum(
        "...skd,...ske->...kde",
        keys,
        values,
        preferred_element_type=accumulation_dtype(keys.dtype),
        precision=EXACT,
    )


def recall(
    queries: Float[Array, "*batch T K R D"], memory: Float[Array, "*batch K D E"]
) -> Float[Array, "*batch T K R E"]:
    """The values that queries read from the memory, `q S`, in the memory's own type."""
    return jnp.einsum("...kde,...tkrd->...tkre", memory, queries.astype(memory.dtype), precision=EXACT)
