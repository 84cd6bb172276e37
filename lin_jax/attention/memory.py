"""The memory `S = sum k v^T` of finished groups: additions to it, reads from it, and its scan over chunks.

Katharopoulos et al. 2020 for the recurrence; FLASH (Hua et al. 2022) for taking it a group at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class MemoryScan(NamedTuple):
    """The memory as it stands before each of `n` chunks, and after the last."""

    before: Float[Array, "n B K D E"]
    after: Float[Array, "B K D E"]


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
