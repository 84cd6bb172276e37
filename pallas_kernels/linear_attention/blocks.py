"""Linear attention of one block, for one head: plain functions of small arrays that all implementations are made of.

    outputs = (weights values + age q S) / divisor,   weights = mask decay^lag (q·k)

with S the memory before the block. Sums are float32, or float64 where the inputs are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.linear_attention.problem import LinearPlan
from pallas_kernels.products import matmul, memory_matmul, zero_absent


class BlockMasks(NamedTuple):
    """Masks of a block's rows and pairs, and their distances in tokens.

    Attributes:
        met: `[C, C]` pairs of a query and a key.
        lag: `[C, C]` tokens from key to query, where they meet.
        there: `[C, 1]` rows that are there.
        reads: `[C, 1]` queries of the document that the memory is of.
        since: `[C, 1]` tokens from the block's beginning to each row, itself included.
        folded: `[C, 1]` rows that join the memory after the block.
        left: `[C, 1]` tokens from each row to the block's end.
        keep: whether the memory survives the block: no other document has begun.
        span: tokens of the block.
    """

    met: Bool[Array, "C C"]
    lag: Int[Array, "C C"]
    there: Bool[Array, "C 1"]
    reads: Bool[Array, "C 1"]
    since: Int[Array, "C 1"]
    folded: Bool[Array, "C 1"]
    left: Int[Array, "C 1"]
    keep: Bool[Array, ""]
    span: Int[Array, ""]


def block_masks_in_row(block: Int[Array, ""], plan: LinearPlan) -> BlockMasks:
    """Masks of a block of a row that is one document."""
    query, key = _count(plan.block, 0), _count(plan.block, 1)
    there = block * plan.block + query < plan.length
    span = jnp.minimum(plan.length - block * plan.block, plan.block)
    return BlockMasks(
        met=key <= query,
        lag=jnp.maximum(query - key, 0),
        there=there,
        reads=there,
        since=query + 1,
        folded=there,
        left=jnp.maximum(span - 1 - query, 0),
        keep=jnp.bool_(True),
        span=span,
    )


def block_masks_by_segment(
    block: Int[Array, ""],
    rows: Int[Array, "parts C"],
    carried: tuple[Int[Array, ""], Int[Array, ""]],
    clock: tuple[Int[Array, ""], Int[Array, ""]],
    plan: LinearPlan,
) -> BlockMasks:
    """Masks of a block of a packed row.

    Args:
        block: number of the block.
        rows: `[2 or more, C]` segment ids and clock.
        carried: segment ids of the memory's document before the block, and after it.
        clock: the clock before the block, and after it.
        plan: the plan.
    """
    rows = jnp.where(block * plan.block + _count(plan.block, 1) < plan.length, rows, 0)
    upright = rows.T
    segment, time, own, now = rows[:1], rows[1:2], upright[:, :1], upright[:, 1:2]
    met = (own == segment) & (segment > 0) & (_count(plan.block, 1) <= _count(plan.block, 0))
    return BlockMasks(
        met=met,
        lag=jnp.maximum(now - time, 0),
        there=own > 0,
        reads=(own > 0) & (own == carried[0]),
        since=jnp.maximum(now - clock[0], 0),
        folded=(own > 0) & (own == carried[1]),
        left=jnp.maximum(clock[1] - now, 0),
        keep=carried[0] == carried[1],
        span=clock[1] - clock[0],
    )


def _count(length: int, axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (length, 1) if axis == 0 else (1, length), axis)


def aged(array: Array, log_decay: Array | None, tokens: Int[Array, "..."]) -> Array:
    """An array decayed by a number of tokens."""
    return array if log_decay is None else array * jnp.exp(log_decay * tokens.astype(array.dtype))


def block_weights(queries: Array, keys: Array, log_decay: Array | None, masks: BlockMasks) -> Float[Array, "C C"]:
    """Weights of the block's pairs."""
    return jnp.where(masks.met, aged(matmul(queries, keys, (1, 1)), log_decay, masks.lag), 0)


def block_sums(
    queries: Float[Array, "C D"],
    keys: Float[Array, "C D"],
    values: Float[Array, "C E"],
    memory: Float[Array, "D E"],
    normaliser: Float[Array, "1 D"],
    log_decay: Array | None,
    masks: BlockMasks,
) -> tuple[Float[Array, "C E"], Float[Array, "C 1"]]:
    """Weighted sums of values for one query head, and the sums of the weights."""
    weights = block_weights(queries, keys, log_decay, masks)
    read = aged(memory_matmul(queries, memory, (1, 0)), log_decay, masks.since)
    total = aged(jnp.sum(queries.astype(weights.dtype) * normaliser, axis=1, keepdims=True), log_decay, masks.since)
    sums = matmul(weights.astype(values.dtype), values, (1, 0)) + jnp.where(masks.reads, read, 0)
    return sums, jnp.sum(weights, axis=1, keepdims=True) + jnp.where(masks.reads, total, 0)


def divisor(totals: Float[Array, "..."], floor: float) -> Float[Array, "..."]:
    """The divisor of sums: no weights at all give zero, not NaN."""
    return jnp.maximum(totals, floor) if floor else jnp.where(totals == 0, 1, totals)


def joined(
    keys: Float[Array, "C D"],
    values: Float[Array, "C E"],
    memory: Float[Array, "D E"],
    normaliser: Float[Array, "1 D"],
    log_decay: Array | None,
    masks: BlockMasks,
) -> tuple[Float[Array, "D E"], Float[Array, "1 D"]]:
    """The memory and the normaliser after the block."""
    wide = aged(zero_absent(keys, masks.folded).astype(memory.dtype), log_decay, masks.left)
    if log_decay is None:
        added = matmul(zero_absent(keys, masks.folded), values, (0, 0))
    else:
        added = memory_matmul(values, wide, (0, 0)).T
    kept = [jnp.where(masks.keep, aged(each, log_decay, masks.span), 0) for each in (memory, normaliser)]
    return kept[0] + added, kept[1] + jnp.sum(wide, axis=0, keepdims=True)
