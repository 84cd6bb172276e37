"""Kernel bodies for TPU: one block of rows for a few heads at a time.

Head after head and row after row, blocks are visited in order (outputs) or in reverse (gradients), with the memory, or
its gradient, in scratch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.augmented_attention.blocks import (
    WindowMasks,
    block_outputs,
    joining,
    unit_rows,
    unit_rows_gradient,
    window_masks_by_segment,
    window_masks_in_row,
    window_score_gradient,
    window_weights,
)
from pallas_kernels.augmented_attention.problem import AugmentedPlan
from pallas_kernels.products import matmul, memory_matmul, zero_absent
from pallas_kernels.tpu.heads import ProgramHeads, Ref


class AugmentedScalars(NamedTuple):
    """Scalars prefetched before a program begins.

    Attributes:
        alpha: `[H]` float32, None without a grouped branch.
        carried: `[B, n + 1]` segment id of the memory's document before each block and after the last; None where
            every row is one document from its beginning.
        finished: `[B]` tokens of the row's last document that are in finished groups; None likewise.
    """

    alpha: Ref
    carried: Ref
    finished: Ref


class AugmentedInputs(NamedTuple):
    """Inputs of a program; `first_*` are the rows before the row, None without a state.

    Attributes:
        queries: `[C, k R D]`.
        keys: `[C, k D]`, previous_keys and first_keys: `[P, k D]`.
        values: `[C, k E]`, previous_values and first_values: `[P, k E]`.
        matrix: `[k R, C, P + C]` the convolution as a matrix, None without one.
        memory: `[k, D, E]` float32, before the row; None if there was nothing.
        segments: `[8, C]` segment ids, positions and whether the memory holds a token already; None for whole rows.
        previous_segments: `[8, P]`.
    """

    queries: Ref
    keys: Ref
    previous_keys: Ref
    first_keys: Ref
    values: Ref
    previous_values: Ref
    first_values: Ref
    matrix: Ref
    memory: Ref
    segments: Ref
    previous_segments: Ref


def window_masks_of(
    scalars: AugmentedScalars, inputs: AugmentedInputs, block: jax.Array, plan: AugmentedPlan
) -> WindowMasks:
    """The masks of a block."""
    if inputs.segments is None:
        return window_masks_in_row(block, plan)
    row = pl.program_id(1)
    window = jnp.concatenate([inputs.previous_segments[...], inputs.segments[...]], axis=1)
    carried = tuple(scalars.carried[row, each] for each in (block, block + 1, plan.blocks))
    return window_masks_by_segment(block, window, carried, scalars.finished[row], plan)


class Window(NamedTuple):
    """Keys and values of a window, with zeros where there is nothing, and the keys as they are scored."""

    raw_keys: jax.Array  # [P + C, D]
    keys: jax.Array  # [P + C, D]
    values: jax.Array  # [P + C, E]


def window_of(
    inputs: AugmentedInputs, head: int, block: jax.Array, masks: WindowMasks, plan: AugmentedPlan, heads: ProgramHeads
) -> Window:
    """The window of one key/value head."""

    def joined(previous: Ref, own: Ref, part: slice) -> jax.Array:
        return zero_absent(jnp.concatenate([previous[:, part], own[:, part]], axis=0), masks.keys)

    key_part, value_part = heads.keys(head), heads.values(head)
    raw = joined(inputs.previous_keys, inputs.keys, key_part)
    keys = unit_rows(raw) if plan.unit else raw
    values = joined(inputs.previous_values, inputs.values, value_part)
    if inputs.first_keys is not None:
        begins = block == 0
        keys = _begun(keys, inputs.first_keys[:, key_part], begins, plan)
        values = _begun(values, inputs.first_values[:, value_part], begins, plan)
        keys, values = zero_absent(keys, masks.keys), zero_absent(values, masks.keys)
    return Window(raw, keys, values)


def _begun(rows: jax.Array, first: jax.Array, begins: jax.Array, plan: AugmentedPlan) -> jax.Array:
    """A window whose rows before the block are those before the row, if it begins the row."""
    return jnp.concatenate([jnp.where(begins, first, rows[: plan.before]), rows[plan.before :]], axis=0)


class QueryRows(NamedTuple):
    """A query head: its rows as they came and as they are scored, its factor and its convolution."""

    raw: jax.Array  # [C, D]
    queries: jax.Array  # [C, D]
    alpha: jax.Array | None
    matrix: jax.Array | None  # [C, P + C]


def query_rows_of(
    scalars: AugmentedScalars,
    inputs: AugmentedInputs,
    head: int,
    masks: WindowMasks,
    plan: AugmentedPlan,
    heads: ProgramHeads,
) -> QueryRows:
    """The rows, factor and convolution of one query head."""
    raw = zero_absent(inputs.queries[:, heads.keys(head)], masks.queries)
    first = pl.program_id(0) * heads.together * heads.share
    return QueryRows(
        raw,
        unit_rows(raw) if plan.unit else raw,
        None if scalars.alpha is None else scalars.alpha[first + head],
        None if inputs.matrix is None else inputs.matrix[head],
    )


def begin(inputs: AugmentedInputs, memory: Ref) -> None:
    """Puts the memory before the row into scratch."""
    memory[...] = jnp.zeros_like(memory) if inputs.memory is None else inputs.memory[...]


def forward_kernel(
    scalars: AugmentedScalars,
    inputs: AugmentedInputs,
    outputs: Ref,
    before: Ref,
    after: Ref,
    memory: Ref,
    *,
    plan: AugmentedPlan,
    heads: ProgramHeads,
) -> None:
    """Outputs `[C, k R E]` of a block, and the memory `[k, D, E]` after the row.

    To be differentiated also the memory before every block; else `before` is None.
    """
    block = pl.program_id(2)
    pl.when(block == 0)(lambda: begin(inputs, memory))
    if before is not None:
        before[...] = memory[...]
    masks = window_masks_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        window = window_of(inputs, head, block, masks, plan, heads)
        for query_head in heads.queries(head):
            asked = query_rows_of(scalars, inputs, query_head, masks, plan, heads)
            result = block_outputs(
                asked.queries, window.keys, window.values, asked.alpha, asked.matrix, memory[head], masks, plan
            )
            outputs[:, heads.values(query_head)] = result.astype(outputs.dtype)
        memory[head] = jnp.where(masks.keep, memory[head], 0) + joining(window.keys, window.values, masks)

    @pl.when(block == plan.blocks - 1)
    def _() -> None:
        after[...] = memory[...]


class AugmentedGradientOutputs(NamedTuple):
    """Outputs of the pass in reverse.

    Attributes:
        queries: `[C, k R D]`.
        keys: `[C, k D]`.
        values: `[C, k E]`.
        matrix: `[k R, C, P + C]` float32, summed over blocks and rows; None without a convolution.
        alpha: `[k R, 8, 128]` float32, likewise, the same number everywhere; None without a grouped branch.
        first_keys: `[P, k D]`, None without a state.
        first_values: `[P, k E]`, None without a state.
        memory: `[k, D, E]` float32, of the memory before the row.
    """

    queries: Ref
    keys: Ref
    values: Ref
    matrix: Ref
    alpha: Ref
    first_keys: Ref
    first_values: Ref
    memory: Ref


class Carried(NamedTuple):
    """Scratch of the pass in reverse: gradients of the memory, and of the rows that a later block's window had.

    Attributes:
        memory: `[k, D, E]` float32.
        keys: `[k, P, D]` float32, of the keys as they are scored.
        values: `[k, P, E]` float32.
    """

    memory: Ref
    keys: Ref
    values: Ref


def gradient_kernel(
    scalars: AugmentedScalars,
    inputs: AugmentedInputs,
    cotangents: Ref,
    before: Ref,
    after: Ref,
    gradients: AugmentedGradientOutputs,
    carried: Carried,
    *,
    plan: AugmentedPlan,
    heads: ProgramHeads,
) -> None:
    """All gradients, from the last block to the first.

    `before` `[k, D, E]` is the memory before the block, `after` `[k, D, E]` the gradient of the memory after the row.
    """
    block = plan.blocks - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried.memory[...] = after[...]
        for part in (carried.keys, carried.values):
            part[...] = jnp.zeros_like(part)

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        for total in (gradients.alpha, gradients.matrix):
            if total is not None:
                total[...] = jnp.zeros_like(total)

    masks = window_masks_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        window = window_of(inputs, head, block, masks, plan, heads)
        memory = carried.memory[head]
        key_gradient = memory_matmul(zero_absent(window.values, masks.folded), memory, (1, 1))
        value_gradient = memory_matmul(zero_absent(window.keys, masks.folded), memory, (1, 0))
        memory = jnp.where(masks.keep, memory, 0)
        for query_head in heads.queries(head):
            asked = query_rows_of(scalars, inputs, query_head, masks, plan, heads)
            cotangent = zero_absent(cotangents[:, heads.values(query_head)], masks.queries)
            scores = matmul(asked.queries, window.keys, (1, 1))
            weights = window_weights(scores, asked.alpha, asked.matrix, masks, plan)
            value_gradient += matmul(weights.astype(cotangent.dtype), cotangent, (0, 0))
            upstream = matmul(cotangent, window.values, (1, 1))
            slope = window_score_gradient(scores, upstream, asked.alpha, masks, plan)
            key_gradient += matmul(slope.astype(asked.queries.dtype), asked.queries, (0, 0))
            query_gradient = matmul(slope.astype(window.keys.dtype), window.keys, (1, 0))
            if asked.alpha is not None:
                read = jnp.where(masks.reads, memory_matmul(cotangent, before[head], (1, 1)), 0)
                query_gradient += asked.alpha * read
                change = jnp.sum(jnp.where(masks.earlier, scores * upstream, 0))
                change += jnp.sum(read * asked.queries.astype(jnp.float32))
                gradients.alpha[query_head] += jnp.full(gradients.alpha.shape[1:], change)
                memory += asked.alpha * matmul(zero_absent(asked.queries, masks.reads), cotangent, (0, 0))
            if gradients.matrix is not None:
                gradients.matrix[query_head] += jnp.where(masks.near, upstream, 0)
            if plan.unit:
                query_gradient = unit_rows_gradient(asked.raw, query_gradient)
            gradients.queries[:, heads.keys(query_head)] = query_gradient.astype(gradients.queries.dtype)
        carried.memory[head] = memory
        _write(gradients, carried, head, (key_gradient, value_gradient), window, plan, heads)

    @pl.when(block == 0)
    def _() -> None:
        gradients.memory[...] = carried.memory[...]
        if gradients.first_keys is not None:
            _write_first(gradients, carried, heads)


def _write(
    gradients: AugmentedGradientOutputs,
    carried: Carried,
    head: int,
    found: tuple[jax.Array, jax.Array],
    window: Window,
    plan: AugmentedPlan,
    heads: ProgramHeads,
) -> None:
    """Writes a block's rows, to which the block after it has added; leaves the rows before it for the next visit."""
    late = plan.block - plan.before

    def own(rows: jax.Array, later: jax.Array) -> jax.Array:
        early, shared = rows[plan.before : plan.before + late], rows[plan.before + late :] + later
        return shared if late == 0 else jnp.concatenate([early, shared], axis=0)

    key_rows, value_rows = own(found[0], carried.keys[head]), own(found[1], carried.values[head])
    carried.keys[head], carried.values[head] = (each[: plan.before] for each in found)
    if plan.unit:
        key_rows = unit_rows_gradient(window.raw_keys[plan.before :], key_rows)
    gradients.keys[:, heads.keys(head)] = key_rows.astype(gradients.keys.dtype)
    gradients.values[:, heads.values(head)] = value_rows.astype(gradients.values.dtype)


def _write_first(gradients: AugmentedGradientOutputs, carried: Carried, heads: ProgramHeads) -> None:
    for head in range(heads.together):
        gradients.first_keys[:, heads.keys(head)] = carried.keys[head].astype(gradients.first_keys.dtype)
        gradients.first_values[:, heads.values(head)] = carried.values[head].astype(gradients.first_values.dtype)
