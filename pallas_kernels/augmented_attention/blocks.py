"""Augmented attention of one block of queries and its window of keys, for one head: plain functions of small arrays.

All implementations are made of them. Sums are float32, or float64 where the inputs are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.augmented_attention.problem import AugmentedPlan
from pallas_kernels.precision import upcast
from pallas_kernels.products import matmul, memory_matmul, zero_absent


class WindowMasks(NamedTuple):
    """Masks of the rows and pairs of a block and its window.

    Attributes:
        local: `[C, M]` pairs of the local branch.
        earlier: `[C, M]` pairs of the grouped branch.
        near: `[C, M]` pairs of one document, for the convolution.
        keys: `[M, 1]` window rows that are there.
        queries: `[C, 1]` block rows that are there.
        folded: `[M, 1]` window rows that join the memory after the block.
        reads: `[C, 1]` queries of the document that the memory is of.
        keep: whether the memory survives the block: no other document has begun.
    """

    local: Bool[Array, "C M"]
    earlier: Bool[Array, "C M"]
    near: Bool[Array, "C M"]
    keys: Bool[Array, "M 1"]
    queries: Bool[Array, "C 1"]
    folded: Bool[Array, "M 1"]
    reads: Bool[Array, "C 1"]
    keep: Bool[Array, ""]


def window_masks_in_row(block: Int[Array, ""], plan: AugmentedPlan) -> WindowMasks:
    """Masks of a block of a row that is one document from its beginning."""
    begin = block * plan.block
    query, key = begin + _count(plan.block, 0), begin - plan.before + _count(plan.width, 1)
    upright = begin - plan.before + _count(plan.width, 0)
    there = (key >= 0) & (key < plan.length)
    held = (upright >= 0) & (upright < plan.length)
    query_group, key_group = _group(query, plan), _group(key, plan)
    return WindowMasks(
        local=there & (query_group == key_group) & (key <= query),
        earlier=there & (key_group < query_group),
        near=jnp.broadcast_to(there, (plan.block, plan.width)),
        keys=held,
        queries=query < plan.length,
        folded=held & (_count(plan.width, 0) < plan.block),
        reads=query < plan.length,
        keep=jnp.bool_(True),
    )


def window_masks_by_segment(
    block: Int[Array, ""],
    window: Int[Array, "parts M"],
    carried: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]],
    finished: Int[Array, ""],
    plan: AugmentedPlan,
) -> WindowMasks:
    """Masks of a block of a packed row.

    Args:
        block: number of the block.
        window: `[3 or more, M]` segment ids, positions, and whether the memory holds the token already.
        carried: segment ids of the memory's document before the block, after it and after the row.
        finished: tokens of the row's last document in finished groups.
        plan: the plan.
    """
    index = block * plan.block - plan.before + _count(plan.width, 1)
    window = jnp.where(index < plan.length, window, 0)
    upright = window.T
    segment, position, known = (window[part : part + 1] for part in range(3))
    own, where, inside = (upright[:, part : part + 1] for part in range(3))
    asked, asked_at = own[plan.before :], where[plan.before :]
    near = (asked == segment) & (segment > 0)
    met = near & (known == 0)
    query_group, key_group = _group(asked_at, plan), _group(position, plan)
    leaves = (_count(plan.width, 0) < plan.block) | (block == plan.blocks - 1)
    complete = (own != carried[2]) | (where < finished)
    return WindowMasks(
        local=met & (query_group == key_group) & (position <= asked_at),
        earlier=met & (key_group < query_group),
        near=near,
        keys=own > 0,
        queries=asked > 0,
        folded=(own > 0) & (own == carried[1]) & (inside == 0) & leaves & complete,
        reads=asked == carried[0],
        keep=carried[0] == carried[1],
    )


def _count(length: int, axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (length, 1) if axis == 0 else (1, length), axis)


def _group(positions: Array, plan: AugmentedPlan) -> Array:
    return jax.lax.div(jnp.maximum(positions, 0), jnp.int32(plan.group))


def unit_rows(rows: Float[Array, "n D"]) -> Float[Array, "n D"]:
    """Rows scaled to length one; a zero row stays zero."""
    wide = upcast(rows)
    return (wide * unit_factor(wide)).astype(rows.dtype)


def unit_rows_gradient(rows: Float[Array, "n D"], gradient: Float[Array, "n D"]) -> Float[Array, "n D"]:
    """Gradient of rows, given that of their unit vectors."""
    wide = rows.astype(gradient.dtype)
    scale = unit_factor(wide)
    direction = wide * scale
    return scale * (gradient - direction * jnp.sum(direction * gradient, axis=-1, keepdims=True))


def unit_factor(wide: Float[Array, "*batch D"]) -> Float[Array, "*batch 1"]:
    """One over each row's length, zero for a zero row."""
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def window_weights(
    scores: Float[Array, "C M"],
    alpha: Array | None,
    matrix: Float[Array, "C M"] | None,
    masks: WindowMasks,
    plan: AugmentedPlan,
) -> Float[Array, "C M"]:
    """Weights of all branches together over a window's pairs; `matrix` is the convolution's."""
    weights = jnp.zeros_like(scores)
    if plan.local:
        weights += jnp.where(masks.local, jnp.square(jnp.maximum(scores, 0)), 0)
    if alpha is not None:
        weights += jnp.where(masks.earlier, alpha * scores, 0)
    if matrix is not None:
        weights += jnp.where(masks.near, matrix.astype(scores.dtype), 0)
    return weights


def window_score_gradient(
    scores: Float[Array, "C M"],
    weights: Float[Array, "C M"],
    alpha: Array | None,
    masks: WindowMasks,
    plan: AugmentedPlan,
) -> Float[Array, "C M"]:
    """Gradient of the scores, given that of the pairs' weights."""
    gradient = jnp.zeros_like(scores)
    if plan.local:
        gradient += jnp.where(masks.local, 2 * jnp.maximum(scores, 0) * weights, 0)
    if alpha is not None:
        gradient += jnp.where(masks.earlier, alpha * weights, 0)
    return gradient


def block_outputs(
    queries: Float[Array, "C D"],
    keys: Float[Array, "M D"],
    values: Float[Array, "M E"],
    alpha: Array | None,
    matrix: Float[Array, "C M"] | None,
    memory: Float[Array, "D E"] | None,
    masks: WindowMasks,
    plan: AugmentedPlan,
) -> Float[Array, "C E"]:
    """Outputs of a block for one query head; queries and keys as they are scored."""
    scores = matmul(queries, keys, (1, 1))
    weights = window_weights(scores, alpha, matrix, masks, plan)
    outputs = matmul(weights.astype(values.dtype), values, (1, 0))
    if alpha is not None and memory is not None:
        outputs += jnp.where(masks.reads, alpha * memory_matmul(queries, memory, (1, 0)), 0)
    return outputs


def joining(keys: Float[Array, "M D"], values: Float[Array, "M E"], masks: WindowMasks) -> Float[Array, "D E"]:
    """The window's addition to the memory after its block."""
    return matmul(zero_absent(keys, masks.folded), values, (0, 0))
