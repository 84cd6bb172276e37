"""Kernel bodies for TPU: one block of queries and the window of keys before and in it, for a few heads.

A window is the `P` rows before a block and the block's `C` rows, P being no less than a group and than the
convolution's reach. Whatever lies before the window is in a finished group for all queries of the block, so that it is
read from the memory; pairs inside the window are scored by position. After a block, the first C rows of its window
join the memory, because they leave the next window. Blocks are visited in order (outputs, gradients of queries) or in
reverse (gradients of keys and values), with the memory, or its gradient, in scratch: it never visits HBM in between.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Ref = Any


@dataclass(frozen=True)
class Plan:
    """What is fixed when a kernel is compiled.

    Attributes:
        group: tokens G in a group.
        before: rows P of a window before its block.
        block: rows C of a block.
        blocks: how many blocks a row has.
        length: tokens T of a row.
        kv_heads: key/value heads that one program handles.
        share: query heads R that share a key/value head.
        key_size: D.
        value_size: E.
        unit: scale queries and keys to length one.
        local: whether there is a local branch, `relu(q·k)^2`.
        grouped: whether there is a grouped branch.
        convolved: whether there is a convolution.
    """

    group: int
    before: int
    block: int
    blocks: int
    length: int
    kv_heads: int
    share: int
    key_size: int
    value_size: int
    unit: bool
    local: bool
    grouped: bool
    convolved: bool


class Scalars(NamedTuple):
    """Numbers that are known before a program begins.

    Attributes:
        alpha: `[H]` float32.
        carried: `[B, n + 1]` the document that the memory speaks of before each block and after the last; None where
            every row is one document from its start.
        finished: `[B]` tokens of the row's last document that are in finished groups; None likewise.
    """

    alpha: Ref
    carried: Ref | None
    finished: Ref | None


class Inputs(NamedTuple):
    """What a program reads; `first_*` are the rows before the row, None without a state.

    Attributes:
        queries: `[C, k R D]`.
        keys: `[C, k D]`, previous_keys and first_keys: `[P, k D]`.
        values: `[C, k E]`, previous_values and first_values: `[P, k E]`.
        band: `[k R, C, P + C]` the convolution as a matrix, None without one.
        memory: `[k, D, E]` float32, before the row.
        placed: `[8, C]` documents, positions and whether a token is in the memory already; None for whole rows.
        previous_placed: `[8, P]`.
    """

    queries: Ref
    keys: Ref
    previous_keys: Ref
    first_keys: Ref | None
    values: Ref
    previous_values: Ref
    first_values: Ref | None
    band: Ref | None
    memory: Ref
    placed: Ref | None
    previous_placed: Ref | None


class Place(NamedTuple):
    """Which rows are there, and which pairs meet, in a block and its window."""

    local: jax.Array  # [C, P + C]
    earlier: jax.Array  # [C, P + C]
    near: jax.Array  # [C, P + C]
    held: jax.Array  # [P + C, 1]
    asked: jax.Array  # [C, 1]
    folded: jax.Array  # [P + C, 1]
    reads: jax.Array  # [C, 1]
    keep: jax.Array  # []


def _rows(count: int, axis: int) -> jax.Array:
    shape = (count, 1) if axis == 0 else (1, count)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def place_of(scalars: Scalars, inputs: Inputs, block: jax.Array, plan: Plan) -> Place:
    """The masks of a block."""
    if inputs.placed is None:
        return _place_in_whole_row(block, plan)
    return _place_by_document(scalars, inputs, block, plan)


def _group(positions: jax.Array, plan: Plan) -> jax.Array:
    return jax.lax.div(jnp.maximum(positions, 0), jnp.int32(plan.group))


def _place_in_whole_row(block: jax.Array, plan: Plan) -> Place:
    width = plan.before + plan.block
    begin = block * plan.block
    query, key = begin + _rows(plan.block, 0), begin - plan.before + _rows(width, 1)
    upright = begin - plan.before + _rows(width, 0)
    there = (key >= 0) & (key < plan.length)
    held = (upright >= 0) & (upright < plan.length)
    query_group, key_group = _group(query, plan), _group(key, plan)
    return Place(
        local=there & (query_group == key_group) & (key <= query),
        earlier=there & (key_group < query_group),
        near=jnp.broadcast_to(there, (plan.block, width)),
        held=held,
        asked=query < plan.length,
        folded=held & (_rows(width, 0) < plan.block),
        reads=query < plan.length,
        keep=jnp.bool_(True),
    )


def _place_by_document(scalars: Scalars, inputs: Inputs, block: jax.Array, plan: Plan) -> Place:
    row = pl.program_id(0)
    window = jnp.concatenate([inputs.previous_placed[...], inputs.placed[...]], axis=1)
    columns = jnp.arange(plan.before + plan.block)
    there = (block * plan.block - plan.before + _rows(columns.size, 1)) < plan.length
    window = jnp.where(there, window, 0)
    upright = window.T
    document, position, known = (window[part : part + 1] for part in range(3))
    held = upright[:, 0:1] > 0
    asked_document, asked_position = upright[plan.before :, 0:1], upright[plan.before :, 1:2]
    near = (asked_document == document) & (document > 0)
    met = near & (known == 0)
    asked_group, group = _group(asked_position, plan), _group(position, plan)
    speaks_of, next_of = scalars.carried[row, block], scalars.carried[row, block + 1]
    leaves = _rows(columns.size, 0) < plan.block
    joins = jnp.where(block == plan.blocks - 1, upright[:, 1:2] < scalars.finished[row], leaves)
    return Place(
        local=met & (asked_group == group) & (position <= asked_position),
        earlier=met & (group < asked_group),
        near=near,
        held=held,
        asked=asked_document > 0,
        folded=held & (upright[:, 0:1] == next_of) & (upright[:, 2:3] == 0) & joins,
        reads=asked_document == speaks_of,
        keep=speaks_of == next_of,
    )


class Window(NamedTuple):
    """Keys and values of a window, with zeros where there is nothing, and the keys as they are scored."""

    raw_keys: jax.Array  # [P + C, D]
    keys: jax.Array  # [P + C, D]
    values: jax.Array  # [P + C, E]


def window_of(inputs: Inputs, head: int, block: jax.Array, place: Place, plan: Plan) -> Window:
    """The window of one key/value head."""

    def joined(first: Ref | None, previous: Ref, own: Ref, size: int) -> jax.Array:
        part = slice(head * size, (head + 1) * size)
        before = previous[:, part]
        if first is not None:
            before = jnp.where(block == 0, first[:, part], before)
        rows = jnp.concatenate([before, own[:, part]], axis=0)
        return jnp.where(place.held, rows, jnp.zeros_like(rows))

    keys = joined(inputs.first_keys, inputs.previous_keys, inputs.keys, plan.key_size)
    values = joined(inputs.first_values, inputs.previous_values, inputs.values, plan.value_size)
    return Window(keys, unit(keys) if plan.unit else keys, values)


def queries_of(inputs: Inputs, head: int, place: Place, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """A query head's rows, zero where there are none, as they came and as they are scored."""
    raw = inputs.queries[:, head * plan.key_size : (head + 1) * plan.key_size]
    raw = jnp.where(place.asked, raw, jnp.zeros_like(raw))
    return raw, unit(raw) if plan.unit else raw


def _scale(wide: jax.Array) -> jax.Array:
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def unit(rows: jax.Array) -> jax.Array:
    """Rows scaled to length one."""
    wide = rows.astype(jnp.float32)
    return (wide * _scale(wide)).astype(rows.dtype)


def unit_gradient(rows: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gradient of rows, given that of their unit vectors."""
    wide = rows.astype(jnp.float32)
    scale = _scale(wide)
    direction = wide * scale
    return scale * (gradient - direction * jnp.sum(direction * gradient, axis=-1, keepdims=True))


def product(one: jax.Array, other: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product of matrices over the given axes, in float32."""
    exact = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        one, other, (((contract[0],), (contract[1],)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def memory_product(rows: jax.Array, memory: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product of rows with the float32 memory, which is not rounded: for bfloat16 rows it is cut into three parts."""
    if rows.dtype != jnp.bfloat16:
        return product(rows.astype(jnp.float32), memory, contract)
    total, rest = None, memory
    for _ in range(3):
        part = rest.astype(jnp.bfloat16)
        rest = rest - part.astype(jnp.float32)
        term = product(rows, part, contract)
        total = term if total is None else total + term
    return total


def pair_weights(scores: jax.Array, band: jax.Array | None, alpha: jax.Array, place: Place, plan: Plan) -> jax.Array:
    """Weights of all branches over a window's pairs, `[C, P + C]` in float32."""
    weights = jnp.zeros_like(scores)
    if plan.local:
        weights += jnp.where(place.local, jnp.square(jnp.maximum(scores, 0)), 0)
    if plan.grouped:
        weights += jnp.where(place.earlier, alpha * scores, 0)
    if band is not None:
        weights += jnp.where(place.near, band.astype(jnp.float32), 0)
    return weights


def next_memory(memory: jax.Array, window: Window, place: Place) -> jax.Array:
    """The memory after a block."""
    keys = jnp.where(place.folded, window.keys, jnp.zeros_like(window.keys))
    return jnp.where(place.keep, memory, 0) + product(keys, window.values, (0, 0))


def forward_kernel(scalars: Scalars, inputs: Inputs, outputs: Ref, after: Ref, memory: Ref, *, plan: Plan) -> None:
    """Outputs `[C, k R E]` of a block, and the memory `[k, D, E]` after the row."""
    block = pl.program_id(2)
    heads = pl.program_id(1) * plan.kv_heads

    @pl.when(block == 0)
    def _() -> None:
        memory[...] = inputs.memory[...]

    place = place_of(scalars, inputs, block, plan)
    for head in range(plan.kv_heads):
        window = window_of(inputs, head, block, place, plan)
        for query_head in range(head * plan.share, (head + 1) * plan.share):
            alpha = scalars.alpha[heads * plan.share + query_head]
            _, queries = queries_of(inputs, query_head, place, plan)
            scores = product(queries, window.keys, (1, 1))
            band = None if inputs.band is None else inputs.band[query_head]
            weights = pair_weights(scores, band, alpha, place, plan)
            result = product(weights.astype(window.values.dtype), window.values, (1, 0))
            if plan.grouped:
                read = memory_product(queries, memory[head], (1, 0))
                result += jnp.where(place.reads, alpha * read, 0)
            part = slice(query_head * plan.value_size, (query_head + 1) * plan.value_size)
            outputs[:, part] = result.astype(outputs.dtype)
        if plan.grouped:
            memory[head] = next_memory(memory[head], window, place)

    @pl.when(block == plan.blocks - 1)
    def _() -> None:
        after[...] = memory[...]


def score_gradient(scores: jax.Array, weights: jax.Array, alpha: jax.Array, place: Place, plan: Plan) -> jax.Array:
    """Gradient of scores, given that of the pairs' weights."""
    gradient = jnp.zeros_like(scores)
    if plan.local:
        gradient += jnp.where(place.local, 2 * jnp.maximum(scores, 0) * weights, 0)
    if plan.grouped:
        gradient += jnp.where(place.earlier, alpha * weights, 0)
    return gradient


def cotangent_of(cotangents: Ref, head: int, place: Place, plan: Plan) -> jax.Array:
    """Gradient of a query head's outputs, zero where there are none."""
    rows = cotangents[:, head * plan.value_size : (head + 1) * plan.value_size]
    return jnp.where(place.asked, rows, jnp.zeros_like(rows))


class QueryGradients(NamedTuple):
    """What the pass in order writes.

    Attributes:
        queries: `[C, k R D]`.
        band: `[k R, C, P + C]` float32, summed over blocks; None without a convolution.
        alpha: `[k R, 8, 128]` float32, the same number everywhere.
    """

    queries: Ref
    band: Ref | None
    alpha: Ref


def query_gradient_kernel(
    scalars: Scalars, inputs: Inputs, cotangents: Ref, gradients: QueryGradients, memory: Ref, *, plan: Plan
) -> None:
    """Gradients of queries, of the convolution's matrix and of alpha, block after block."""
    block = pl.program_id(2)
    heads = pl.program_id(1) * plan.kv_heads

    @pl.when(block == 0)
    def _() -> None:
        memory[...] = inputs.memory[...]
        gradients.alpha[...] = jnp.zeros_like(gradients.alpha)
        if gradients.band is not None:
            gradients.band[...] = jnp.zeros_like(gradients.band)

    place = place_of(scalars, inputs, block, plan)
    for head in range(plan.kv_heads):
        window = window_of(inputs, head, block, place, plan)
        for query_head in range(head * plan.share, (head + 1) * plan.share):
            alpha = scalars.alpha[heads * plan.share + query_head]
            raw, queries = queries_of(inputs, query_head, place, plan)
            cotangent = cotangent_of(cotangents, query_head, place, plan)
            scores = product(queries, window.keys, (1, 1))
            weights = product(cotangent, window.values, (1, 1))
            gradient = score_gradient(scores, weights, alpha, place, plan)
            result = product(gradient.astype(window.keys.dtype), window.keys, (1, 0))
            if plan.grouped:
                read = memory_product(cotangent, memory[head], (1, 1))
                result += jnp.where(place.reads, alpha * read, 0)
                slope = jnp.sum(jnp.where(place.earlier, scores * weights, 0))
                slope += jnp.sum(jnp.where(place.reads, read * queries.astype(jnp.float32), 0))
                gradients.alpha[query_head] += jnp.full(gradients.alpha.shape[1:], slope)
            if gradients.band is not None:
                gradients.band[query_head] += jnp.where(place.near, weights, 0)
            if plan.unit:
                result = unit_gradient(raw, result)
            part = slice(query_head * plan.key_size, (query_head + 1) * plan.key_size)
            gradients.queries[:, part] = result.astype(gradients.queries.dtype)
        if plan.grouped:
            memory[head] = next_memory(memory[head], window, place)


class KeyGradients(NamedTuple):
    """What the pass in reverse writes.

    Attributes:
        keys: `[C, k D]`, and values: `[C, k E]`.
        first_keys: `[P, k D]`, and first_values: `[P, k E]`, None without a state.
        memory: `[k, D, E]` float32, of the memory before the row.
    """

    keys: Ref
    values: Ref
    first_keys: Ref | None
    first_values: Ref | None
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


def key_gradient_kernel(
    scalars: Scalars,
    inputs: Inputs,
    cotangents: Ref,
    after: Ref,
    gradients: KeyGradients,
    carried: Carried,
    *,
    plan: Plan,
) -> None:
    """Gradients of keys, values and the memory, from the last block to the first; `after` is that of the last memory."""
    block = plan.blocks - 1 - pl.program_id(2)
    heads = pl.program_id(1) * plan.kv_heads

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried.memory[...] = after[...]
        carried.keys[...] = jnp.zeros_like(carried.keys)
        carried.values[...] = jnp.zeros_like(carried.values)

    place = place_of(scalars, inputs, block, plan)
    for head in range(plan.kv_heads):
        window = window_of(inputs, head, block, place, plan)
        dtype = window.values.dtype
        folded_keys = jnp.where(place.folded, window.keys, jnp.zeros_like(window.keys))
        folded_values = jnp.where(place.folded, window.values, jnp.zeros_like(window.values))
        memory = carried.memory[head]
        key_gradient = memory_product(folded_values, memory, (1, 1))
        value_gradient = memory_product(folded_keys, memory, (1, 0))
        memory = jnp.where(place.keep, memory, 0)
        for query_head in range(head * plan.share, (head + 1) * plan.share):
            alpha = scalars.alpha[heads * plan.share + query_head]
            _, queries = queries_of(inputs, query_head, place, plan)
            cotangent = cotangent_of(cotangents, query_head, place, plan)
            scores = product(queries, window.keys, (1, 1))
            band = None if inputs.band is None else inputs.band[query_head]
            weights = pair_weights(scores, band, alpha, place, plan)
            value_gradient += product(weights.astype(dtype), cotangent, (0, 0))
            slope = score_gradient(scores, product(cotangent, window.values, (1, 1)), alpha, place, plan)
            key_gradient += product(slope.astype(dtype), queries, (0, 0))
            if plan.grouped:
                asked = jnp.where(place.reads, queries, jnp.zeros_like(queries))
                memory += alpha * product(asked, cotangent, (0, 0))
        carried.memory[head] = memory
        _write_rows(inputs, gradients, carried, head, window, (key_gradient, value_gradient), plan)

    @pl.when(block == 0)
    def _() -> None:
        gradients.memory[...] = carried.memory[...]
        if gradients.first_keys is not None:
            _write_first(inputs, gradients, carried, plan)


def _write_rows(
    inputs: Inputs,
    gradients: KeyGradients,
    carried: Carried,
    head: int,
    window: Window,
    found: tuple[jax.Array, jax.Array],
    plan: Plan,
) -> None:
    """Writes a block's rows, to which the block after it has added, and leaves the rows before it for the next visit."""
    keys, values = found
    late = plan.block - plan.before

    def own(rows: jax.Array, later: jax.Array) -> jax.Array:
        rows = rows[plan.before :]
        if late == 0:
            return rows + later
        return jnp.concatenate([rows[:late], rows[late:] + later], axis=0)

    key_rows, value_rows = own(keys, carried.keys[head]), own(values, carried.values[head])
    carried.keys[head], carried.values[head] = keys[: plan.before], values[: plan.before]
    if plan.unit:
        key_rows = unit_gradient(window.raw_keys[plan.before :], key_rows)
    key_part = slice(head * plan.key_size, (head + 1) * plan.key_size)
    value_part = slice(head * plan.value_size, (head + 1) * plan.value_size)
    gradients.keys[:, key_part] = key_rows.astype(gradients.keys.dtype)
    gradients.values[:, value_part] = value_rows.astype(gradients.values.dtype)


def _write_first(inputs: Inputs, gradients: KeyGradients, carried: Carried, plan: Plan) -> None:
    for head in range(plan.kv_heads):
        key_part = slice(head * plan.key_size, (head + 1) * plan.key_size)
        value_part = slice(head * plan.value_size, (head + 1) * plan.value_size)
        rows = carried.keys[head]
        if plan.unit:
            rows = unit_gradient(inputs.first_keys[:, key_part], rows)
        gradients.first_keys[:, key_part] = rows.astype(gradients.first_keys.dtype)
        gradients.first_values[:, value_part] = carried.values[head].astype(gradients.first_values.dtype)
