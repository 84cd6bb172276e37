"""The memory `S = sum k v^T` of finished groups: additions to it, reads from it, and its scan over chunks.

Katharopoulos et al. 2020 for the recurrence; FLASH (Hua et al. 2022) for taking it a group at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.precision import accumulation_dtype

# State products are taken in full float32: on TPU the default would round the memory to bfloat16.
EXACT = jax.lax.Precision.HIGHEST


class MemoryScan(NamedTuple):
    """The memory as it stands before each of `n` chunks, and after the last."""

    before: Float[Array, "n B K D E"]
    after: Float[Array, "B K D E"]


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
    return jnp.einsum("...tkrd,...kde->...tkre", queries.astype(memory.dtype), memory, precision=EXACT)


def scan_memory(
    updates: Float[Array, "B n K D E"],
    initial: Float[Array, "B K D E"],
    keep: Bool[Array, "B n"] | None = None,
) -> MemoryScan:
    """Adds the chunks' updates up, in order.

    Args:
        updates: `[B, n, K, D, E]` what each chunk adds.
        initial: `[B, K, D, E]` the memory before the first chunk.
        keep: `[B, n]` whether the memory so far survives a chunk; False where another document has begun.
    """

    def step(memory: Array, chunk: tuple[Array, Array | None]) -> tuple[Array, Array]:
        update, kept = chunk
        carried = memory if kept is None else jnp.where(kept[:, None, None, None], memory, 0)
        return carried + update, memory

    per_chunk = jnp.moveaxis(updates, 1, 0)
    after, before = jax.lax.scan(step, initial, (per_chunk, None if keep is None else keep.T))
    return MemoryScan(before, after)


def carried_segment_ids(segment_ids: Int[Array, "B n G"], first: Int[Array, " B"]) -> Int[Array, "B n"]:
    """The segment id of the memory's document after each chunk: that of the last real token so far."""
    batch, chunks, size = segment_ids.shape
    flat = segment_ids.reshape(batch, chunks * size)
    index = jax.lax.cummax(jnp.where(flat > 0, jnp.arange(flat.shape[1]), -1), axis=1)[:, size - 1 :: size]
    found = jnp.take_along_axis(flat, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, found, first[:, None])
