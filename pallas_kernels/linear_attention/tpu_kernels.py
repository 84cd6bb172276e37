"""Kernel bodies for TPU: one block of rows for a few heads at a time.

Blocks are visited in order (outputs) or in reverse (gradients), with the memory and the normaliser, or their gradients,
in scratch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.blocks import (
    Place,
    aged,
    block_sums,
    divisor,
    joined,
    pair_weights,
    place_by_document,
    place_in_row,
)
from pallas_kernels.linear_attention.problem import Plan
from pallas_kernels.products import memory_product, present, product
from pallas_kernels.tpu_heads import SUBLANES, Heads, Ref


class Scalars(NamedTuple):
    """Numbers that are known before a program begins; `carried` and `clock` as in `Placed`, None for whole rows."""

    log_decay: Ref
    carried: Ref
    clock: Ref


class Memories(NamedTuple):
    """A memory `[k, D, E]` and a normaliser `[k, 1, D]`, both float32, or their gradients."""

    values: Ref
    keys: Ref


class Inputs(NamedTuple):
    """What a program reads.

    Attributes:
        queries: `[C, k R D]`.
        keys: `[C, k D]`.
        values: `[C, k E]`.
        start: before the row.
        placed: `[8, C]` documents and clock; None for whole rows.
    """

    queries: Ref
    keys: Ref
    values: Ref
    start: Memories
    placed: Ref


class Cotangents(NamedTuple):
    """Gradients of the weighted sums `[C, k R E]`, and of the sums of weights `[k R, 1, C]`, None if nobody asks."""

    sums: Ref
    totals: Ref


def place_of(scalars: Scalars, inputs: Inputs, block: jax.Array, plan: Plan) -> Place:
    """The masks of a block."""
    if inputs.placed is None:
        return place_in_row(block, plan)
    row = pl.program_id(0)
    carried, clock = ((each[row, block], each[row, block + 1]) for each in (scalars.carried, scalars.clock))
    return place_by_document(block, inputs.placed[...], carried, clock, plan)


def _decay(scalars: Scalars, head: int, heads: Heads) -> jax.Array | None:
    if scalars.log_decay is None:
        return None
    return scalars.log_decay[pl.program_id(1) * heads.together + head]


def _rows(inputs: Inputs, head: int, place: Place, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one head, with zeros where there is nothing."""
    keys, values = inputs.keys[:, heads.keys(head)], inputs.values[:, heads.values(head)]
    return present(keys, place.there), present(values, place.there)


def _upright(row: jax.Array) -> jax.Array:
    """`[1, C]` as `[C, 1]`."""
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def _flat(column: jax.Array) -> jax.Array:
    """`[C, 1]` as `[1, C]`."""
    return jnp.broadcast_to(column, (column.shape[0], SUBLANES)).T[:1]


def _begin(start: Memories, memory: Memories) -> None:
    memory.values[...], memory.keys[...] = start.values[...], start.keys[...]


def _advance(
    memory: Memories, head: int, keys: jax.Array, values: jax.Array, log_decay: jax.Array | None, place: Place
) -> None:
    memory.values[head], memory.keys[head] = joined(
        keys, values, memory.values[head], memory.keys[head], log_decay, place
    )


def forward_kernel(
    scalars: Scalars,
    inputs: Inputs,
    outputs: Ref,
    totals: Ref,
    before: Memories | None,
    after: Memories,
    memory: Memories,
    *,
    plan: Plan,
    heads: Heads,
) -> None:
    """Outputs `[C, k R E]` of a block, and the memory after the row.

    With a floor also the sums of weights `[k R, 1, C]`; to be differentiated also the memory before every block.
    """
    block = pl.program_id(2)
    pl.when(block == 0)(lambda: _begin(inputs.start, memory))
    if before is not None:
        before.values[...], before.keys[...] = memory.values[...], memory.keys[...]
    place = place_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        (keys, values), log_decay = _rows(inputs, head, place, heads), _decay(scalars, head, heads)
        for query_head in heads.queries(head):
            queries = present(inputs.queries[:, heads.keys(query_head)], place.there)
            sums, total = block_sums(queries, keys, values, memory.values[head], memory.keys[head], log_decay, place)
            if plan.floor is not None:
                sums = sums / divisor(total, plan.floor)
                totals[query_head] = _flat(total)
            outputs[:, heads.values(query_head)] = sums.astype(outputs.dtype)
        _advance(memory, head, keys, values, log_decay, place)

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
    inputs: Inputs,
    cotangents: Cotangents,
    query_head: int,
    values: jax.Array,
    log_decay: jax.Array | None,
    place: Place,
    heads: Heads,
) -> _Asked:
    queries = present(inputs.queries[:, heads.keys(query_head)], place.there)
    sums = present(cotangents.sums[:, heads.values(query_head)], place.there)
    weights, totals = product(sums, values, (1, 1)), None
    if cotangents.totals is not None:
        totals = present(_upright(cotangents.totals[query_head]), place.there)
        weights += totals
    return _Asked(queries, sums, totals, jnp.where(place.met, aged(weights, log_decay, place.lag), 0))


class Gradients(NamedTuple):
    """Gradients of queries `[C, k R D]`, keys `[C, k D]`, values `[C, k E]`, and of the memory before the row."""

    queries: Ref
    keys: Ref
    values: Ref
    start: Memories


def gradient_kernel(
    scalars: Scalars,
    inputs: Inputs,
    cotangents: Cotangents,
    before: Memories,
    after: Memories,
    gradients: Gradients,
    carried: Memories,
    *,
    plan: Plan,
    heads: Heads,
) -> None:
    """Gradients from the last block to the first, given the memory before each block, and that of the one after all."""
    block = plan.blocks - 1 - pl.program_id(2)
    pl.when(pl.program_id(2) == 0)(lambda: _begin(after, carried))
    place = place_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        (keys, values), log_decay = _rows(inputs, head, place, heads), _decay(scalars, head, heads)
        memory, normaliser = carried.values[head], carried.keys[head]
        key_gradient = memory_product(values, memory, (1, 1)) + normaliser
        value_gradient = memory_product(keys, memory, (1, 0))
        key_gradient, value_gradient = (
            jnp.where(place.folded, aged(each, log_decay, place.left), 0) for each in (key_gradient, value_gradient)
        )
        memory, normaliser = (
            jnp.where(place.keep, aged(each, log_decay, place.span), 0) for each in (memory, normaliser)
        )
        for query_head in heads.queries(head):
            asked = _asked(inputs, cotangents, query_head, values, log_decay, place, heads)
            weights = pair_weights(asked.queries, keys, log_decay, place)
            value_gradient += product(weights.astype(asked.sums.dtype), asked.sums, (0, 0))
            key_gradient += product(asked.scores.astype(asked.queries.dtype), asked.queries, (0, 0))
            query_gradient = product(asked.scores.astype(keys.dtype), keys, (1, 0))
            query_gradient += _read_gradient(asked, before, head, log_decay, place)
            gradients.queries[:, heads.keys(query_head)] = query_gradient.astype(gradients.queries.dtype)
            added = _memory_gradient(asked, log_decay, place, memory.dtype)
            memory, normaliser = memory + added[0], normaliser + added[1]
        carried.values[head], carried.keys[head] = memory, normaliser
        gradients.keys[:, heads.keys(head)] = key_gradient.astype(gradients.keys.dtype)
        gradients.values[:, heads.values(head)] = value_gradient.astype(gradients.values.dtype)

    @pl.when(block == 0)
    def _() -> None:
        gradients.start.values[...], gradients.start.keys[...] = carried.values[...], carried.keys[...]


def _read_gradient(asked: _Asked, before: Memories, head: int, log_decay: jax.Array | None, place: Place) -> jax.Array:
    """Gradient `[C, D]` of queries by what they read from the memory."""
    read = memory_product(asked.sums, before.values[head], (1, 1))
    if asked.totals is not None:
        read += asked.totals * before.keys[head]
    return jnp.where(place.reads, aged(read, log_decay, place.since), 0)


def _memory_gradient(
    asked: _Asked, log_decay: jax.Array | None, place: Place, wide: jnp.dtype
) -> tuple[jax.Array, jax.Array | float]:
    """What the block's queries add to the gradient of the memory before it, and of the normaliser."""
    reading = present(asked.queries, place.reads)
    queries = aged(reading.astype(wide), log_decay, place.since)
    exact = log_decay is None
    added = product(reading, asked.sums, (0, 0)) if exact else memory_product(asked.sums, queries, (0, 0)).T
    return added, 0.0 if asked.totals is None else jnp.sum(queries * asked.totals, axis=0, keepdims=True)
