"""The mathematics of one block of queries and its window of keys, for one head: plain functions of small arrays.

All implementations are made of them. Sums are float32, or float64 where the inputs are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.augmented_attention.problem import Plan
from pallas_kernels.products import accumulation_dtype, memory_product, present, product


class Place(NamedTuple):
    """Which rows are there, and which pairs meet, in a block and its window.

    Attributes:
        local: `[C, M]` pairs of the local branch.
        earlier: `[C, M]` pairs of the grouped branch.
        near: `[C, M]` pairs of one document, for the convolution.
        held: `[M, 1]` window rows that are there.
        asked: `[C, 1]` block rows that are there.
        folded: `[M, 1]` window rows that join the memory after the block.
        reads: `[C, 1]` queries of the document that the memory speaks of.
        keep: whether the memory survives the block: no other document has begun.
    """

    local: Bool[Array, "C M"]
    earlier: Bool[Array, "C M"]
    near: Bool[Array, "C M"]
    held: Bool[Array, "M 1"]
    asked: Bool[Array, "C 1"]
    folded: Bool[Array, "M 1"]
    reads: Bool[Array, "C 1"]
    keep: Bool[Array, ""]


def place_in_row(block: Int[Array, ""], plan: Plan) -> Place:
    """The place of a block of a row that is one document from its start."""
    begin = block * plan.block
    query, key = begin + _count(plan.block, 0), begin - plan.before + _count(plan.width, 1)
    upright = begin - plan.before + _count(plan.width, 0)
    there = (key >= 0) & (key < plan.length)
    held = (upright >= 0) & (upright < plan.length)
    query_group, key_group = _group(query, plan), _group(key, plan)
    return Place(
        local=there & (query_group == key_group) & (key <= query),
        earlier=there & (key_group < query_group),
        near=jnp.broadcast_to(there, (plan.block, plan.width)),
        held=held,
        asked=query < plan.length,
        folded=held & (_count(plan.width, 0) < plan.block),
        reads=query < plan.length,
        keep=jnp.bool_(True),
    )


def place_by_document(
    block: Int[Array, ""],
    window: Int[Array, "parts M"],
    carried: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]],
    finished: Int[Array, ""],
    plan: Plan,
) -> Place:
    """The place of a block of a row with a placement.

    Args:
        block: which block.
        window: `[3 or more, M]` documents, positions, and whether the memory holds the token already.
        carried: the document that the memory speaks of before the block, after it and after the row.
        finished: tokens of the row's last document in finished groups.
        plan: the plan.
    """
    index = block * plan.block - plan.before + _count(plan.width, 1)
    window = jnp.where(index < plan.length, window, 0)
    upright = window.T
    document, position, known = (window[part : part + 1] for part in range(3))
    own, where, inside = (upright[:, part : part + 1] for part in range(3))
    asked, asked_at = own[plan.before :], where[plan.before :]
    near = (asked == document) & (document > 0)
    met = near & (known == 0)
    query_group, key_group = _group(asked_at, plan), _group(position, plan)
    leaves = (_count(plan.width, 0) < plan.block) | (block == plan.blocks - 1)
    complete = (own != carried[2]) | (where < finished)
    return Place(
        local=met & (query_group == key_group) & (position <= asked_at),
        earlier=met & (key_group < query_group),
        near=near,
        held=own > 0,
        asked=asked > 0,
        folded=(own > 0) & (own == carried[1]) & (inside == 0) & leaves & complete,
        reads=asked == carried[0],
        keep=carried[0] == carried[1],
    )


def _count(length: int, axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (length, 1) if axis == 0 else (1, length), axis)


def _group(positions: Array, plan: Plan) -> Array:
    return jax.lax.div(jnp.maximum(positions, 0), jnp.int32(plan.group))


def unit(rows: Float[Array, "n D"]) -> Float[Array, "n D"]:
    """Rows scaled to length one; a zero row stays zero."""
    wide = rows.astype(accumulation_dtype(rows.dtype))
    return (wide * _scale(wide)).astype(rows.dtype)


def unit_gradient(rows: Float[Array, "n D"], gradient: Float[Array, "n D"]) -> Float[Array, "n D"]:
    """Gradient of rows, given that of their unit vectors."""
    wide = rows.astype(gradient.dtype)
    scale = _scale(wide)
    direction = wide * scale
    return scale * (gradient - direction * jnp.sum(direction * gradient, axis=-1, keepdims=True))


def _scale(wide: Array) -> Array:
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def pair_weights(
    scores: Float[Array, "C M"], alpha: Array | None, matrix: Float[Array, "C M"] | None, place: Place, plan: Plan
) -> Float[Array, "C M"]:
    """Weights of all branches together over a window's pairs; `matrix` is the convolution's."""
    weights = jnp.zeros_like(scores)
    if plan.local:
        weights += jnp.where(place.local, jnp.square(jnp.maximum(scores, 0)), 0)
    if alpha is not None:
        weights += jnp.where(place.earlier, alpha * scores, 0)
    if matrix is not None:
        weights += jnp.where(place.near, matrix.astype(scores.dtype), 0)
    return weights


def score_gradient(
    scores: Float[Array, "C M"], weights: Float[Array, "C M"], alpha: Array | None, place: Place, plan: Plan
) -> Float[Array, "C M"]:
    """Gradient of the scores, given that of the pairs' weights."""
    gradient = jnp.zeros_like(scores)
    if plan.local:
        gradient += jnp.where(place.local, 2 * jnp.maximum(scores, 0) * weights, 0)
    if alpha is not None:
        gradient += jnp.where(place.earlier, alpha * weights, 0)
    return gradient


def block_outputs(
    queries: Float[Array, "C D"],
    keys: Float[Array, "M D"],
    values: Float[Array, "M E"],
    alpha: Array | None,
    matrix: Float[Array, "C M"] | None,
    memory: Float[Array, "D E"] | None,
    place: Place,
    plan: Plan,
) -> Float[Array, "C E"]:
    """Outputs of a block for one query head; queries and keys as they are scored."""
    scores = product(queries, keys, (1, 1))
    weights = pair_weights(scores, alpha, matrix, place, plan)
    outputs = product(weights.astype(values.dtype), values, (1, 0))
    if alpha is not None and memory is not None:
        outputs += jnp.where(place.reads, alpha * memory_product(queries, memory, (1, 0)), 0)
    return outputs


def joining(keys: Float[Array, "M D"], values: Float[Array, "M E"], place: Place) -> Float[Array, "D E"]:
    """What a window adds to the memory after its block."""
    return product(present(keys, place.folded), values, (0, 0))
