"""Kernel bodies for TPU: one block of rows for a few heads at a time.

Head after head and row after row, blocks are visited in order (outputs) or in reverse (gradients), with the memory, or
its gradient, in scratch. The backward pass computes weights anew; it reads neither outputs nor their divisors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.products import zero_absent
from pallas_kernels.tpu.heads import ProgramHeads, Ref, upright
from pallas_kernels.windowed_attention.blocks import (
    Ages,
    BlockPairs,
    DecayClock,
    MappedRows,
    ages_of,
    block_outputs,
    block_pairs_by_segment,
    block_pairs_in_row,
    block_weights,
    clock_gradient,
    clock_of,
    head_gradients,
    joined,
    joined_gradients,
    mapped,
    mapped_gradients,
)
from pallas_kernels.windowed_attention.problem import WindowedPlan


class WindowedScalars(NamedTuple):
    """Scalars prefetched before a program begins.

    Attributes:
        balance: `[H]` float32.
        carried: `[B, n + 1]` segment id of the memory's document before each block and after the last; None where
            every row is one document from its beginning.
        finished: `[B]` tokens of the row's last document before the window of the query after it; None likewise.
    """

    balance: Ref
    carried: Ref
    finished: Ref


class MapRefs(NamedTuple):
    """A feature map's parts for a few heads: weights `[heads, D, M]` and biases `[heads, 1, M]`, None for zero."""

    queries: Ref
    keys: Ref
    query_bias: Ref
    key_bias: Ref


class FeatureMemory(NamedTuple):
    """A memory `[k, E, M]` and a normaliser `[k, 1, M]`, both float32, or their gradients."""

    values: Ref
    keys: Ref


class TokenRows(NamedTuple):
    """Rows of tokens: keys `[n, k D]`, values `[n, k E]`, logarithms of decay `[k, 1, n]` (None without decay)."""

    keys: Ref
    values: Ref
    decays: Ref


class WindowedInputs(NamedTuple):
    """Inputs of a program.

    Attributes:
        queries: `[C, k R D]`.
        own: tokens of the block.
        previous: the P tokens before it.
        first: the P tokens before the row, None without a state.
        maps: the feature map.
        memory: before the row; None if there was nothing.
        segments: `[8, C]` segment ids and positions; None for whole rows.
        previous_segments: `[8, P]`.
    """

    queries: Ref
    own: TokenRows
    previous: TokenRows
    first: TokenRows | None
    maps: MapRefs
    memory: FeatureMemory | None
    segments: Ref
    previous_segments: Ref


def block_pairs_of(
    scalars: WindowedScalars, inputs: WindowedInputs, block: jax.Array, plan: WindowedPlan
) -> BlockPairs:
    """The masks of a block."""
    if inputs.segments is None:
        return block_pairs_in_row(block, plan)
    row = pl.program_id(1)
    window = jnp.concatenate([inputs.previous_segments[...], inputs.segments[...]], axis=1)
    carried = tuple(scalars.carried[row, each] for each in (block, block + 1, plan.blocks))
    return block_pairs_by_segment(block, window, carried, scalars.finished[row], plan)


class KeyRows(NamedTuple):
    """The window of one key/value head, with zeros where there is nothing."""

    keys: jax.Array  # [W, D]
    values: jax.Array  # [W, E]
    features: MappedRows
    clock: DecayClock | None
    ages: Ages | None


def key_rows_of(
    inputs: WindowedInputs, head: int, block: jax.Array, masks: BlockPairs, plan: WindowedPlan, heads: ProgramHeads
) -> KeyRows:
    """The window of one key/value head, and its features."""
    begins, first = block == 0, inputs.first

    def joined_rows(part: slice, name: str) -> jax.Array:
        early = getattr(inputs.previous, name)[:, part]
        if first is not None:
            early = jnp.where(begins, getattr(first, name)[:, part], early)
        return zero_absent(jnp.concatenate([early, getattr(inputs.own, name)[:, part]], axis=0), masks.keys)

    keys, values = joined_rows(heads.keys(head), "keys"), joined_rows(heads.values(head), "values")
    decays = None
    if inputs.own.decays is not None:
        early = inputs.previous.decays[head]
        if first is not None:
            early = jnp.where(begins, first.decays[head], early)
        decays = jnp.where(masks.keys_flat, jnp.concatenate([early, inputs.own.decays[head]], axis=1), 0)
    bias = None if inputs.maps.key_bias is None else inputs.maps.key_bias[head]
    features = mapped(keys, inputs.maps.keys[head], bias, plan, queries=False)
    return KeyRows(keys, values, features, clock_of(decays, plan), ages_of(decays, masks, plan))


def queries_of(
    inputs: WindowedInputs, head: int, masks: BlockPairs, plan: WindowedPlan, heads: ProgramHeads
) -> tuple[jax.Array, MappedRows]:
    """The rows of one query head, and their features."""
    queries = zero_absent(inputs.queries[:, heads.keys(head)], masks.queries)
    bias = None if inputs.maps.query_bias is None else inputs.maps.query_bias[head]
    return queries, mapped(queries, inputs.maps.queries[head], bias, plan, queries=True)


def _balance(scalars: WindowedScalars, head: int, heads: ProgramHeads) -> jax.Array:
    return scalars.balance[pl.program_id(0) * heads.together * heads.share + head]


def forward_kernel(
    scalars: WindowedScalars,
    inputs: WindowedInputs,
    outputs: Ref,
    before: FeatureMemory | None,
    after: FeatureMemory | None,
    totals: Ref,
    memory: FeatureMemory,
    *,
    plan: WindowedPlan,
    heads: ProgramHeads,
) -> None:
    """Outputs `[C, k R E]` of a block, and the memory after the row, where it has a meaning.

    To be differentiated also the memory before every block; else `before` is None. With sinks also the logarithms of
    the sums of weights, `totals` `[k R, 1, C]`; else None.
    """
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _() -> None:
        for number, part in enumerate(memory):
            part[...] = jnp.zeros_like(part) if inputs.memory is None else inputs.memory[number][...]

    if before is not None:
        before.values[...], before.keys[...] = memory.values[...], memory.keys[...]
    masks = block_pairs_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        window = key_rows_of(inputs, head, block, masks, plan, heads)
        held, normaliser = memory.values[head], memory.keys[head]
        features = window.features.rounded
        for query_head in heads.queries(head):
            queries, asked = queries_of(inputs, query_head, masks, plan, heads)
            balance = _balance(scalars, query_head, heads)
            weights = block_weights(
                queries, window.keys, asked, features, normaliser, balance, window.clock, masks, plan
            )
            found = block_outputs(weights, asked, window.values, held)
            outputs[:, heads.values(query_head)] = found.astype(outputs.dtype)
            if totals is not None:
                totals[query_head] = weights.totals
        memory.values[head], memory.keys[head] = joined(features, window.values, held, normaliser, window.ages, masks)

    if after is not None:

        @pl.when(block == plan.blocks - 1)
        def _() -> None:
            after.values[...], after.keys[...] = memory.values[...], memory.keys[...]


class WindowedGradientOutputs(NamedTuple):
    """Outputs of the pass in reverse.

    Attributes:
        queries: `[C, k R D]`.
        own: of the block's tokens.
        first: of the tokens before the row, None without a state.
        maps: float32, summed over blocks and rows.
        balance: `[k R, 8, 128]` float32, likewise, the same number everywhere.
        memory: of the memory before the row, None if there was nothing.
    """

    queries: Ref
    own: TokenRows
    first: TokenRows | None
    maps: MapRefs
    balance: Ref
    memory: FeatureMemory | None


class CarriedGradients(NamedTuple):
    """Scratch of the pass in reverse: gradients of the memory, and of the rows that a later block's window had.

    Attributes:
        memory: of the memory.
        keys: `[k, P, D]` float32.
        values: `[k, P, E]` float32.
        decays: `[k, 1, P]` float32, None without decay.
    """

    memory: FeatureMemory
    keys: Ref
    values: Ref
    decays: Ref


def gradient_kernel(
    scalars: WindowedScalars,
    inputs: WindowedInputs,
    cotangents: Ref,
    before: FeatureMemory,
    after: FeatureMemory | None,
    totals: Ref,
    gradients: WindowedGradientOutputs,
    carried: CarriedGradients,
    *,
    plan: WindowedPlan,
    heads: ProgramHeads,
) -> None:
    """All gradients, from the last block to the first.

    `before` is the memory before the block, `after` the gradient of the memory after the row, `totals` that of the
    logarithms of the sums of weights, both None for zero.
    """
    block = plan.blocks - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for number, part in enumerate(carried.memory):
            part[...] = jnp.zeros_like(part) if after is None else after[number][...]
        for part in carried[1:]:
            if part is not None:
                part[...] = jnp.zeros_like(part)

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        for total in (gradients.balance, *gradients.maps):
            if total is not None:
                total[...] = jnp.zeros_like(total)

    masks = block_pairs_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        _head_gradients(
            scalars, inputs, cotangents, before, totals, gradients, carried, head, block, masks, plan, heads
        )

    first, memory = gradients.first, gradients.memory
    if first is not None and memory is not None:

        @pl.when(block == 0)
        def _() -> None:
            for number, part in enumerate(memory):
                part[...] = carried.memory[number][...]
            _write_first(first, carried, heads)


def _head_gradients(
    scalars: WindowedScalars,
    inputs: WindowedInputs,
    cotangents: Ref,
    before: FeatureMemory,
    totals: Ref,
    gradients: WindowedGradientOutputs,
    carried: CarriedGradients,
    head: int,
    block: jax.Array,
    masks: BlockPairs,
    plan: WindowedPlan,
    heads: ProgramHeads,
) -> None:
    """Gradients of one key/value head and its query heads."""
    window = key_rows_of(inputs, head, block, masks, plan, heads)
    features, held = window.features.rounded, (before.values[head], before.keys[head])
    after = carried.memory.values[head], carried.memory.keys[head]
    total = joined_gradients(features, window.values, held, after, window.ages, masks, plan)
    feature_rows, value_rows, decays, memory, normaliser = total
    key_rows = jnp.zeros(window.keys.shape, jnp.float32)
    for query_head in heads.queries(head):
        queries, asked = queries_of(inputs, query_head, masks, plan, heads)
        cotangent = zero_absent(cotangents[:, heads.values(query_head)], masks.queries)
        balance = _balance(scalars, query_head, heads)
        weights = block_weights(queries, window.keys, asked, features, held[1], balance, window.clock, masks, plan)
        change = None if totals is None else zero_absent(upright(totals[query_head]), masks.queries)
        found = head_gradients(
            cotangent, queries, window.keys, window.values, asked, features, *held, weights, change, plan
        )
        feature_rows, value_rows = feature_rows + found.key_features, value_rows + found.values
        key_rows, memory, normaliser = key_rows + found.keys, memory + found.memory, normaliser + found.normaliser
        if decays is not None:
            decays += clock_gradient(found.clock_queries, found.clock_keys, plan)
        moved = jnp.sum(found.clock_queries)
        gradients.balance[query_head] += jnp.full(gradients.balance.shape[1:], moved)
        weight = inputs.maps.queries[query_head]
        own = mapped_gradients(queries, asked, weight, found.query_features, plan, queries=True)
        gradients.maps.queries[query_head] += own.weight
        if gradients.maps.query_bias is not None:
            gradients.maps.query_bias[query_head] += own.bias
        gradients.queries[:, heads.keys(query_head)] = (found.queries + own.rows).astype(gradients.queries.dtype)
    carried.memory.values[head], carried.memory.keys[head] = memory, normaliser
    own = mapped_gradients(window.keys, window.features, inputs.maps.keys[head], feature_rows, plan, queries=False)
    gradients.maps.keys[head] += own.weight
    if gradients.maps.key_bias is not None:
        gradients.maps.key_bias[head] += own.bias
    _write(gradients.own, carried, head, key_rows + own.rows, value_rows, decays, plan, heads)


def _write(
    gradients: TokenRows,
    carried: CarriedGradients,
    head: int,
    key_rows: jax.Array,
    value_rows: jax.Array,
    decays: jax.Array | None,
    plan: WindowedPlan,
    heads: ProgramHeads,
) -> None:
    """Writes a block's rows, to which the block after it has added; leaves the rows before it for the next visit."""

    def own(rows: jax.Array, later: jax.Array, axis: int) -> jax.Array:
        early, shared = (
            jax.lax.slice_in_dim(rows, begin, end, axis=axis)
            for begin, end in ((plan.before, plan.block), (plan.block, plan.width))
        )
        return jnp.concatenate([early, shared + later], axis=axis) if plan.block > plan.before else shared + later

    keys, values = own(key_rows, carried.keys[head], 0), own(value_rows, carried.values[head], 0)
    gradients.keys[:, heads.keys(head)] = keys.astype(gradients.keys.dtype)
    gradients.values[:, heads.values(head)] = values.astype(gradients.values.dtype)
    carried.keys[head], carried.values[head] = key_rows[: plan.before], value_rows[: plan.before]
    if decays is not None:
        gradients.decays[head] = own(decays, carried.decays[head], 1)
        carried.decays[head] = decays[:, : plan.before]


def _write_first(first: TokenRows, carried: CarriedGradients, heads: ProgramHeads) -> None:
    for head in range(heads.together):
        first.keys[:, heads.keys(head)] = carried.keys[head].astype(first.keys.dtype)
        first.values[:, heads.values(head)] = carried.values[head].astype(first.values.dtype)
        if first.decays is not None:
            first.decays[head] = carried.decays[head]
