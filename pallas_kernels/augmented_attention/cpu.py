"""Augmented linear attention for XLA's compiler for CPUs: heads before tokens, and the gradient written by hand.

The numbers are those of `xla`. Derived by JAX, the gradient copies matrices of pairs in other orders, a dozen times a
layer; here each product reads them as they lie, and few arrays are moved: queries, keys, values and outputs once each.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.augmented_attention.blocks import (
    WindowMasks,
    unit_factor,
    unit_rows,
    window_score_gradient,
    window_weights,
)
from pallas_kernels.augmented_attention.problem import AugmentedPlan, AugmentedProblem
from pallas_kernels.implementations import targets_single_cpu

# Blocks of a row up to which their memories are summed without a loop, which costs more than the sums.
_FEW_BLOCKS = 16


def suits(problem: AugmentedProblem) -> bool:
    """True on a single CPU, in one type that needs no wider sums."""
    kinds = {each.dtype for each in problem[:3]}
    return targets_single_cpu() and len(kinds) == 1 and kinds <= {jnp.dtype("float32"), jnp.dtype("float64")}


class HeadsFirst(NamedTuple):
    """Arrays that the gradient is of: blocks of queries and their windows, heads first.

    Attributes:
        queries: `[B, K, n, R, C, D]`, as they are scored.
        keys: `[B, K, n, M, D]`, as they are scored.
        values: `[B, K, n, M, E]`.
        alpha: `[K, R]`, or None.
        matrix: `[K, R, C, M]` the convolution's, or None.
        initial: `[B, K, D, E]` the memory before the rows.
    """

    queries: Float[Array, "B K n R C D"]
    keys: Float[Array, "B K n M D"]
    values: Float[Array, "B K n M E"]
    alpha: Float[Array, "K R"] | None
    matrix: Float[Array, "K R C M"] | None
    initial: Float[Array, "B K D E"]


def forward(
    problem: AugmentedProblem,
    plan: AugmentedPlan,
    masks: WindowMasks,
    matrix: Float[Array, "K R C M"] | None,
    initial: Float[Array, "B K D E"],
) -> tuple[Float[Array, "B T H E"], Float[Array, "B K D E"]]:
    """Outputs, and the memory after the rows.

    Args:
        problem: absent keys and values are zeros.
        plan: the plan.
        masks: of all blocks `[n]`, or `[B, n]`.
        matrix: the convolution's, or None.
        initial: the memory before the rows.
    """
    batch, length, heads, size = problem.queries.shape
    kv_heads = problem.keys.shape[2]
    queries = jnp.moveaxis(problem.queries.reshape(batch, length, kv_heads, -1, size), 1, 3)
    keys, prior = jnp.swapaxes(problem.keys, 1, 2), problem.prior
    if plan.unit:
        queries, keys = _unit(queries), _unit(keys)
    end = plan.blocks * plan.block - length
    queries = jnp.pad(queries, (*((0, 0),) * 3, (0, end), (0, 0)))
    queries = queries.reshape(batch, kv_heads, -1, plan.blocks, plan.block, size)
    inputs = HeadsFirst(
        jnp.swapaxes(queries, 2, 3),
        _windows(keys, None if prior is None else prior.keys, plan),
        _windows(jnp.swapaxes(problem.values, 1, 2), None if prior is None else prior.values, plan),
        None if problem.alpha is None else problem.alpha.astype(initial.dtype).reshape(kv_heads, -1),
        matrix,
        initial,
    )
    outputs, after = _attention(inputs, _over_heads(masks), plan)
    outputs = outputs.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, outputs.shape[5])
    return outputs[:, :length], after


def _windows(rows: Float[Array, "B K T D"], first: Float[Array, "B P K D"] | None, plan: AugmentedPlan) -> Array:
    """Windows `[B, K, n, M, D]` of rows, with `first` or zeros before them."""
    batch, heads, length, size = rows.shape
    own = jnp.pad(rows, ((0, 0), (0, 0), (0, plan.blocks * plan.block - length), (0, 0)))
    if first is None:
        before = jnp.zeros((batch, heads, plan.before, size), rows.dtype)
    else:
        before = jnp.swapaxes(first.astype(rows.dtype), 1, 2)
    earlier = jnp.concatenate([before, own[:, :, : plan.blocks * plan.block - plan.before]], axis=2)
    blocks = [each.reshape(batch, heads, plan.blocks, plan.block, size) for each in (earlier, own)]
    return jnp.concatenate([blocks[0][:, :, :, : plan.before], blocks[1]], axis=3)


def _over_heads(masks: WindowMasks) -> WindowMasks:
    """Masks with axes of rows and heads: of pairs and rows `[B | 1, 1, n, 1, ...]`, `keep` `[B | 1, n]`."""
    rows = masks.keep.reshape(-1, masks.keep.shape[-1]).shape[0]
    wide = [mask.reshape(rows, 1, -1, 1, *mask.shape[-2:]) for mask in masks[:-1]]
    return WindowMasks._make([*wide, masks.keep.reshape(rows, -1)])


class _Kept(NamedTuple):
    """Residuals of the gradient."""

    inputs: HeadsFirst
    masks: WindowMasks
    scores: Float[Array, "B K n R C M"]
    weights: Float[Array, "B K n R C M"]
    before: Float[Array, "B K n D E"]
    read: Float[Array, "B K n R C E"] | None


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attention(
    inputs: HeadsFirst, masks: WindowMasks, plan: AugmentedPlan
) -> tuple[Float[Array, "B K n R C E"], Float[Array, "B K D E"]]:
    """Outputs of all blocks, and the memory after the last."""
    return _attention_forward(inputs, masks, plan)[0]


def _attention_forward(
    inputs: HeadsFirst, masks: WindowMasks, plan: AugmentedPlan
) -> tuple[tuple[Array, Array], _Kept]:
    queries, keys, values, alpha, matrix, initial = inputs
    updates = _product("bknmd,bknme->bknde", jnp.where(masks.folded[:, :, :, 0], keys, 0), values)
    before, after = _memories(updates, masks.keep, initial)
    scores = _shared("bknqd,bknmd->bknqm", queries, keys)
    weights = window_weights(scores, _factors(alpha), _bands(matrix), masks, plan)
    outputs, read = _shared("bknqm,bknme->bknqe", weights, values), None
    if alpha is not None:
        read = _shared("bknqd,bknde->bknqe", queries, before)
        outputs += jnp.where(masks.reads, _factors(alpha) * read, 0)
    return (outputs, after), _Kept(inputs, masks, scores, weights, before, read)


def _attention_backward(plan: AugmentedPlan, kept: _Kept, cotangents: tuple[Array, Array]) -> tuple[HeadsFirst, None]:
    queries, keys, values, alpha, matrix, _ = kept.inputs
    masks, (cotangent, to_after) = kept.masks, cotangents
    to_weights = _shared("bknqe,bknme->bknqm", cotangent, values)
    to_values = _over_queries("bknqm,bknqe->bknme", kept.weights, cotangent)
    to_scores = window_score_gradient(kept.scores, to_weights, _factors(alpha), masks, plan)
    to_queries = _shared("bknqm,bknmd->bknqd", to_scores, keys)
    to_keys = _over_queries("bknqm,bknqd->bknmd", to_scores, queries)
    to_alpha, to_read = None, None
    if alpha is not None and kept.read is not None:
        known = jnp.where(masks.reads, cotangent, 0)
        to_alpha = jnp.sum(known * kept.read, axis=(0, 2, 4, 5))
        to_alpha += jnp.sum(jnp.where(masks.earlier, kept.scores * to_weights, 0), axis=(0, 2, 4, 5))
        scaled = known * _factors(alpha)
        to_queries += _shared("bknqe,bknde->bknqd", scaled, kept.before)
        to_read = _over_queries("bknqd,bknqe->bknde", queries, scaled)
    to_matrix = None if matrix is None else jnp.sum(jnp.where(masks.near, to_weights, 0), axis=(0, 2))
    to_updates, to_initial = _memories_backward(to_read, to_after, masks.keep, plan.blocks)
    folded = masks.folded[:, :, :, 0]
    to_keys += jnp.where(folded, _product("bknme,bknde->bknmd", values, to_updates), 0)
    to_values += _product("bknmd,bknde->bknme", jnp.where(folded, keys, 0), to_updates)
    return HeadsFirst(to_queries, to_keys, to_values, to_alpha, to_matrix, to_initial), None


_attention.defvjp(_attention_forward, _attention_backward)


def _memories(updates: Float[Array, "B K n D E"], keep: Array, initial: Float[Array, "B K D E"]) -> tuple[Array, Array]:
    """The memory before each block, and after the last."""
    if updates.shape[2] > _FEW_BLOCKS:

        def step(memory: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
            return _if_kept(block[1], memory) + block[0], memory

        after, before = jax.lax.scan(step, initial, (jnp.moveaxis(updates, 2, 0), keep.T))
        return jnp.moveaxis(before, 0, 2), after
    memories = [initial]
    for block in range(updates.shape[2]):
        memories.append(_if_kept(keep[:, block], memories[-1]) + updates[:, :, block])
    return jnp.stack(memories[:-1], axis=2), memories[-1]


def _memories_backward(
    to_before: Float[Array, "B K n D E"] | None, to_after: Float[Array, "B K D E"], keep: Array, blocks: int
) -> tuple[Float[Array, "B K n D E"], Float[Array, "B K D E"]]:
    """Gradients of the updates, and of the first memory."""
    if to_before is None:
        to_before = jnp.zeros((*to_after.shape[:2], blocks, *to_after.shape[2:]), to_after.dtype)
    if blocks > _FEW_BLOCKS:

        def step(gradient: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
            return _if_kept(block[1], gradient) + block[0], gradient

        first, each = jax.lax.scan(step, to_after, (jnp.moveaxis(to_before, 2, 0), keep.T), reverse=True)
        return jnp.moveaxis(each, 0, 2), first
    found = [to_after]
    for block in reversed(range(blocks)):
        found.append(_if_kept(keep[:, block], found[-1]) + to_before[:, :, block])
    return jnp.stack(found[-2::-1], axis=2), found[-1]


def _if_kept(keep: Array, memory: Array) -> Array:
    return jnp.where(keep[:, None, None, None], memory, 0)


def _product(names: str, one: Array, other: Array) -> Array:
    return jnp.einsum(names, one, other, precision=jax.lax.Precision.HIGHEST)


def _shared(names: str, rows: Float[Array, "B K n R C X"], matrices: Float[Array, "B K n Y Z"]) -> Array:
    """Products of the rows of all heads that share a key/value head with its matrices, as one each."""
    found = _product(names, rows.reshape(*rows.shape[:3], -1, rows.shape[5]), matrices)
    return found.reshape(*rows.shape[:5], -1)


def _over_queries(names: str, one: Float[Array, "B K n R C X"], other: Float[Array, "B K n R C Y"]) -> Array:
    """Sums over the queries of all heads that share a key/value head."""
    return _product(names, *(each.reshape(*each.shape[:3], -1, each.shape[5]) for each in (one, other)))


def _factors(alpha: Float[Array, "K R"] | None) -> Any:
    return None if alpha is None else alpha[None, :, None, :, None, None]


def _bands(matrix: Float[Array, "K R C M"] | None) -> Any:
    return None if matrix is None else matrix[None, :, None]


@jax.custom_vjp
def _unit(rows: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Rows of length one; a zero row stays zero."""
    return unit_rows(rows)


def _unit_forward(rows: Array) -> tuple[Array, tuple[Array, Array]]:
    factor = unit_factor(rows)
    return rows * factor, (rows, factor)


def _unit_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    rows, factor = kept
    # Sums as products with ones: those of a fused loop take three times as long.
    product = (rows * gradient).reshape(-1, rows.shape[-1])
    along = (product @ jnp.ones(rows.shape[-1:], rows.dtype)).reshape(factor.shape)
    return (factor * (gradient - rows * (factor * factor * along)),)


_unit.defvjp(_unit_forward, _unit_backward)
