"""Kernel bodies for TPU: one block of rows for a few heads at a time.

Blocks are visited in order (outputs) or in reverse (gradients), with the memory and the normaliser, or their gradients,
in scratch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.blocks import (
    BlockMasks,
    aged,
    block_masks_by_segment,
    block_masks_in_row,
    block_sums,
    block_weights,
    divisor,
    joined,
)
from pallas_kernels.linear_attention.problem import LinearPlan
from pallas_kernels.products import matmul, memory_matmul, zero_absent
from pallas_kernels.tpu.heads import ProgramHeads, Ref, flat, upright


class LinearScalars(NamedTuple):
    """Scalars prefetched before a program begins; `carried` and `clock` as in `PackedBlocks`, None for whole rows."""

    log_decay: Ref
    carried: Ref
    clock: Ref


class MemoryPair(NamedTuple):
    """A memory `[k, D, E]` and a normaliser `[k, 1, D]`, both float32, or their gradients."""

    values: Ref
    keys: Ref


class LinearInputs(NamedTuple):
    """Inputs of a program.

    Attributes:
        queries: `[C, k R D]`.
        keys: `[C, k D]`.
        values: `[C, k E]`.
        start: before the row.
        segments: `[8, C]` segment ids and clock; None for whole rows.
    """

    queries: Ref
    keys: Ref
    values: Ref
    start: MemoryPair
    segments: Ref


class Cotangents(NamedTuple):
    """Gradients of the weighted sums `[C, k R E]`, and of the sums of weights `[k R, 1, C]` or None."""

    sums: Ref
    totals: Ref


def block_masks_of(scalars: LinearScalars, inputs: LinearInputs, block: jax.Array, plan: LinearPlan) -> BlockMasks:
    """The masks of a block."""
    if inputs.segments is None:
        return block_masks_in_row(block, plan)
    row = pl.program_id(0)
    carried, clock = ((each[row, block], each[row, block + 1]) for each in (scalars.carried, scalars.clock))
    return block_masks_by_segment(block, inputs.segments[...], carried, clock, plan)


def _decay(scalars: LinearScalars, head: int, heads: ProgramHeads) -> jax.Array | None:
    if scalars.log_decay is None:
        return None
    return scalars.log_decay[pl.program_id(1) * heads.together + head]


def _rows(inputs: LinearInputs, head: int, masks: BlockMasks, heads: ProgramHeads) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one head, with zeros where there is nothing."""
    keys, values = inputs.keys[:, heads.keys(head)], inputs.values[:, heads.values(head)]
    return zero_absent(keys, masks.there), zero_absent(values, masks.there)


def _begin(start: MemoryPair, memory: MemoryPair) -> None:
    memory.values[...], memory.keys[...] = start.values[...], start.keys[...]


def _advance(
    memory: MemoryPair, head: int, keys: jax.Array, values: jax.Array, log_decay: jax.Array | None, masks: BlockMasks
) -> None:
    memory.values[head], memory.keys[head] = joined(
        keys, values, memory.values[head], memory.keys[head], log_decay, masks
    )


def forward_kernel(
    scalars: LinearScalars,
    inputs: LinearInputs,
    outputs: Ref,
    totals: Ref,
    before: MemoryPair | None,
    after: MemoryPair,
    memory: MemoryPair,
    *,
    plan: LinearPlan,
    heads: ProgramHeads,
) -> None:
    """Outputs `[C, k R E]` of a block, and the memory after the row.

    With a floor also the sums of weights `[k R, 1, C]`; to be differentiated also the memory before every block.
    """
    block = pl.program_id(2)
    pl.when(block == 0)(lambda: _begin(inputs.start, memory))
    if before is not None:
        before.values[...], before.keys[...] = memory.values[...], memory.keys[...]
    masks = block_masks_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        (keys, values), log_decay = _rows(inputs, head, masks, heads), _decay(scalars, head, heads)
        for query_head in heads.queries(head):
            queries = zero_absent(inputs.queries[:, heads.keys(query_head)], masks.there)
            sums, total = block_sums(queries, keys, values, memory.values[head], memory.keys[head], log_decay, masks)
            if plan.floor is not None:
                sums = sums / divisor(total, plan.floor)
                totals[query_head] = flat(total)
            outputs[:, heads.values(query_head)] = sums.astype(outputs.dtype)
        _advance(memory, head, keys, values, log_decay, masks)

    @pl.when(block == plan.blocks - 1)
    def _() -> None:
        after.values[...], after.keys[...] = memory.values[...], memory.keys[...]


class _Asked(NamedTuple):
    """One query head of a block, and the gradients of its pairs' weights."""

    queries: jax.Array  # [C, D]
    sums: jax.Array  # [C, E] gradient of the weighted sums
    totals: jax.Array | None  # [C, 1] gradient of the sums of weights
    scores: jax.Array  # [C, C] gradient of q·k


def _asked(
    inputs: LinearInputs,
    cotangents: Cotangents,
    query_head: int,
    values: jax.Array,
    log_decay: jax.Array | None,
    masks: BlockMasks,
    heads: ProgramHeads,
) -> _Asked:
    queries = zero_absent(inputs.queries[:, heads.keys(query_head)], masks.there)
    sums = zero_absent(cotangents.sums[:, heads.values(query_head)], masks.there)
    weights, totals = matmul(sums, values, (1, 1)), None
    if cotangents.totals is not None:
        totals = zero_absent(upright(cotangents.totals[query_head]), masks.there)
        weights += totals
    return _Asked(queries, sums, totals, jnp.where(masks.met, aged(weights, log_decay, masks.lag), 0))


class LinearGradientOutputs(NamedTuple):
    """Gradients of queries `[C, k R D]`, keys `[C, k D]`, values `[C, k E]`, and of the memory before the row."""

    queries: Ref
    keys: Ref
    values: Ref
    start: MemoryPair


def gradient_kernel(
    scalars: LinearScalars,
    inputs: LinearInputs,
    cotangents: Cotangents,
    before: MemoryPair,
    after: MemoryPair,
    gradients: LinearGradientOutputs,
    carried: MemoryPair,
    *,
    plan: LinearPlan,
    heads: ProgramHeads,
) -> None:
    """Gradients from the last block to the first, given the memory before each block, and that of the one after all."""
    block = plan.blocks - 1 - pl.program_id(2)
    pl.when(pl.program_id(2) == 0)(lambda: _begin(after, carried))
    masks = block_masks_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        (keys, values), log_decay = _rows(inputs, head, masks, heads), _decay(scalars, head, heads)
        memory, normaliser = carried.values[head], carried.keys[head]
        key_gradient = memory_matmul(values, memory, (1, 1)) + normaliser
        value_gradient = memory_matmul(keys, memory, (1, 0))
        key_gradient, value_gradient = (
            jnp.where(masks.folded, aged(each, log_decay, masks.left), 0) for each in (key_gradient, value_gradient)
        )
        memory, normaliser = (
            jnp.where(masks.keep, aged(each, log_decay, masks.span), 0) for each in (memory, normaliser)
        )
        for query_head in heads.queries(head):
            asked = _asked(inputs, cotangents, query_head, values, log_decay, masks, heads)
            weights = block_weights(asked.queries, keys, log_decay, masks)
            value_gradient += matmul(weights.astype(asked.sums.dtype), asked.sums, (0, 0))
            key_gradient += matmul(asked.scores.astype(asked.queries.dtype), asked.queries, (0, 0))
            query_gradient = matmul(asked.scores.astype(keys.dtype), keys, (1, 0))
            query_gradient += _read_gradient(asked, before, head, log_decay, masks)
            gradients.queries[:, heads.keys(query_head)] = query_gradient.astype(gradients.queries.dtype)
            added = _memory_gradient(asked, log_decay, masks, memory.dtype)
            memory, normaliser = memory + added[0], normaliser + added[1]
        carried.values[head], carried.keys[head] = memory, normaliser
        gradients.keys[:, heads.keys(head)] = key_gradient.astype(gradients.keys.dtype)
        gradients.values[:, heads.values(head)] = value_gradient.astype(gradients.values.dtype)

    @pl.when(block == 0)
    def _() -> None:
        gradients.start.values[...], gradients.start.keys[...] = carried.values[...], carried.keys[...]


def _read_gradient(
    asked: _Asked, before: MemoryPair, head: int, log_decay: jax.Array | None, masks: BlockMasks
) -> jax.Array:
    """Gradient `[C, D]` of queries by what they read from the memory."""
    read = memory_matmul(asked.sums, before.values[head], (1, 1))
    if asked.totals is not None:
        read += asked.totals * before.keys[head]
    return jnp.where(masks.reads, aged(read, log_decay, masks.since), 0)


def _memory_gradient(
    asked: _Asked, log_decay: jax.Array | None, masks: BlockMasks, wide: jnp.dtype
) -> tuple[jax.Array, jax.Array | float]:
    """The block's addition to the gradients of the memory before it and of the normaliser."""
    reading = zero_absent(asked.queries, masks.reads)
    queries = aged(reading.astype(wide), log_decay, masks.since)
    exact = log_decay is None
    added = matmul(reading, asked.sums, (0, 0)) if exact else memory_matmul(asked.sums, queries, (0, 0)).T
    return added, 0.0 if asked.totals is None else jnp.sum(queries * asked.totals, axis=0, keepdims=True)
