"""Kernel bodies for TPU: one block of rows for a few heads at a time.

Head after head and row after row, blocks are visited in order (outputs) or in reverse (gradients), with the memory, or
its gradient, in scratch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.augmented_attention.blocks import (
    Place,
    block_outputs,
    joining,
    pair_weights,
    place_by_document,
    place_in_row,
    score_gradient,
    unit,
    unit_gradient,
)
from pallas_kernels.augmented_attention.problem import Plan
from pallas_kernels.products import memory_product, present, product
from pallas_kernels.tpu_heads import Heads, Ref


class Scalars(NamedTuple):
    """Numbers that are known before a program begins.

    Attributes:
        alpha: `[H]` float32, None without a grouped branch.
        carried: `[B, n + 1]` the document that the memory speaks of before each block and after the last; None where
            every row is one document from its start.
        finished: `[B]` tokens of the row's last document that are in finished groups; None likewise.
    """

    alpha: Ref
    carried: Ref
    finished: Ref


class Inputs(NamedTuple):
    """What a program reads; `first_*` are the rows before the row, None without a state.

    Attributes:
        queries: `[C, k R D]`.
        keys: `[C, k D]`, previous_keys and first_keys: `[P, k D]`.
        values: `[C, k E]`, previous_values and first_values: `[P, k E]`.
        matrix: `[k R, C, P + C]` the convolution as a matrix, None without one.
        memory: `[k, D, E]` float32, before the row; None if there was nothing.
        placed: `[8, C]` documents, positions and whether the memory holds a token already; None for whole rows.
        previous_placed: `[8, P]`.
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
    placed: Ref
    previous_placed: Ref


def place_of(scalars: Scalars, inputs: Inputs, block: jax.Array, plan: Plan) -> Place:
    """The masks of a block."""
    if inputs.placed is None:
        return place_in_row(block, plan)
    row = pl.program_id(1)
    window = jnp.concatenate([inputs.previous_placed[...], inputs.placed[...]], axis=1)
    carried = tuple(scalars.carried[row, each] for each in (block, block + 1, plan.blocks))
    return place_by_document(block, window, carried, scalars.finished[row], plan)


class Window(NamedTuple):
    """Keys and values of a window, with zeros where there is nothing, and the keys as they are scored."""

    raw_keys: jax.Array  # [P + C, D]
    keys: jax.Array  # [P + C, D]
    values: jax.Array  # [P + C, E]


def window_of(inputs: Inputs, head: int, block: jax.Array, place: Place, plan: Plan, heads: Heads) -> Window:
    """The window of one key/value head."""

    def joined(previous: Ref, own: Ref, part: slice) -> jax.Array:
        return present(jnp.concatenate([previous[:, part], own[:, part]], axis=0), place.held)

    key_part, value_part = heads.keys(head), heads.values(head)
    raw = joined(inputs.previous_keys, inputs.keys, key_part)
    keys = unit(raw) if plan.unit else raw
    values = joined(inputs.previous_values, inputs.values, value_part)
    if inputs.first_keys is not None:
        begins = block == 0
        keys = _begun(keys, inputs.first_keys[:, key_part], begins, plan)
        values = _begun(values, inputs.first_values[:, value_part], begins, plan)
        keys, values = present(keys, place.held), present(values, place.held)
    return Window(raw, keys, values)


def _begun(rows: jax.Array, first: jax.Array, begins: jax.Array, plan: Plan) -> jax.Array:
    """A window whose rows before the block are those before the row, if it begins the row."""
    return jnp.concatenate([jnp.where(begins, first, rows[: plan.before]), rows[plan.before :]], axis=0)


class Asked(NamedTuple):
    """A query head: its rows as they came and as they are scored, its factor and its convolution."""

    raw: jax.Array  # [C, D]
    queries: jax.Array  # [C, D]
    alpha: jax.Array | None
    matrix: jax.Array | None  # [C, P + C]


def asked_by(scalars: Scalars, inputs: Inputs, head: int, place: Place, plan: Plan, heads: Heads) -> Asked:
    """What one query head asks."""
    raw = present(inputs.queries[:, heads.keys(head)], place.asked)
    first = pl.program_id(0) * heads.together * heads.share
    return Asked(
        raw,
        unit(raw) if plan.unit else raw,
        None if scalars.alpha is None else scalars.alpha[first + head],
        None if inputs.matrix is None else inputs.matrix[head],
    )


def begin(inputs: Inputs, memory: Ref) -> None:
    """Puts the memory before the row into scratch."""
    memory[...] = jnp.zeros_like(memory) if inputs.memory is None else inputs.memory[...]


def forward_kernel(
    scalars: Scalars, inputs: Inputs, outputs: Ref, before: Ref, after: Ref, memory: Ref, *, plan: Plan, heads: Heads
) -> None:
    """Outputs `[C, k R E]` of a block, and the memory `[k, D, E]` after the row.

    To be differentiated also the memory before every block; else `before` is None.
    """
    block = pl.program_id(2)
    pl.when(block == 0)(lambda: begin(inputs, memory))
    if before is not None:
        before[...] = memory[...]
    place = place_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        window = window_of(inputs, head, block, place, plan, heads)
        for query_head in heads.queries(head):
            asked = asked_by(scalars, inputs, query_head, place, plan, heads)
            result = block_outputs(
                asked.queries, window.keys, window.values, asked.alpha, asked.matrix, memory[head], place, plan
            )
            outputs[:, heads.values(query_head)] = result.astype(outputs.dtype)
        memory[head] = jnp.where(place.keep, memory[head], 0) + joining(window.keys, window.values, place)

    @pl.when(block == plan.blocks - 1)
    def _() -> None:
        after[...] = memory[...]


class Gradients(NamedTuple):
    """What the pass in reverse writes.

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
    scalars: Scalars,
    inputs: Inputs,
    cotangents: Ref,
    before: Ref,
    after: Ref,
    gradients: Gradients,
    carried: Carried,
    *,
    plan: Plan,
    heads: Heads,
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

    place = place_of(scalars, inputs, block, plan)
    for head in range(heads.together):
        window = window_of(inputs, head, block, place, plan, heads)
        memory = carried.memory[head]
        key_gradient = memory_product(present(window.values, place.folded), memory, (1, 1))
        value_gradient = memory_product(present(window.keys, place.folded), memory, (1, 0))
        memory = jnp.where(place.keep, memory, 0)
        for query_head in heads.queries(head):
            asked = asked_by(scalars, inputs, query_head, place, plan, heads)
            cotangent = present(cotangents[:, heads.values(query_head)], place.asked)
            scores = product(asked.queries, window.keys, (1, 1))
            weights = pair_weights(scores, asked.alpha, asked.matrix, place, plan)
            value_gradient += product(weights.astype(cotangent.dtype), cotangent, (0, 0))
            upstream = product(cotangent, window.values, (1, 1))
            slope = score_gradient(scores, upstream, asked.alpha, place, plan)
            key_gradient += product(slope.astype(asked.queries.dtype), asked.queries, (0, 0))
            query_gradient = product(slope.astype(window.keys.dtype), window.keys, (1, 0))
            if asked.alpha is not None:
                read = jnp.where(place.reads, memory_product(cotangent, before[head], (1, 1)), 0)
                query_gradient += asked.alpha * read
                change = jnp.sum(jnp.where(place.earlier, scores * upstream, 0))
                change += jnp.sum(read * asked.queries.astype(jnp.float32))
                gradients.alpha[query_head] += jnp.full(gradients.alpha.shape[1:], change)
                memory += asked.alpha * product(present(asked.queries, place.reads), cotangent, (0, 0))
            if gradients.matrix is not None:
                gradients.matrix[query_head] += jnp.where(place.near, upstream, 0)
            if plan.unit:
                query_gradient = unit_gradient(asked.raw, query_gradient)
            gradients.queries[:, heads.keys(query_head)] = query_gradient.astype(gradients.queries.dtype)
        carried.memory[head] = memory
        _write(gradients, carried, head, (key_gradient, value_gradient), window, plan, heads)

    @pl.when(block == 0)
    def _() -> None:
        gradients.memory[...] = carried.memory[...]
        if gradients.first_keys is not None:
            _write_first(gradients, carried, heads)


def _write(
    gradients: Gradients,
    carried: Carried,
    head: int,
    found: tuple[jax.Array, jax.Array],
    window: Window,
    plan: Plan,
    heads: Heads,
) -> None:
    """Writes a block's rows, to which the block after it has added; leaves the rows before it for the next visit."""
    late = plan.block - plan.before

    def own(rows: jax.Array, later: jax.Array) -> jax.Array:
        early, shared = rows[plan.before : plan.before + late], rows[plan.before + late :] + later
        return shared if late == 0 else jnp.concatenate([early, shared], axis=0)

    key_rows, value_rows = own(found[0], carried.keys[head]), own(found[1], carried.values[head])
    carried.keys[head], carried.values[head] = (each[: plan.before] for each in found)
    if plan.unit:
        key_rows = unit_gradient(window.raw_keys[plan.before :], key_rows)
    gradients.keys[:, heads.keys(head)] = key_rows.astype(gradients.keys.dtype)
    gradients.values[:, heads.values(head)] = value_rows.astype(gradients.values.dtype)


def _write_first(gradients: Gradients, carried: Carried, heads: Heads) -> None:
    for head in range(heads.together):
        gradients.first_keys[:, heads.keys(head)] = carried.keys[head].astype(gradients.first_keys.dtype)
        gradients.first_values[:, heads.values(head)] = carried.values[head].astype(gradients.first_values.dtype)
