"""Linear attention in plain XLA: a scan over blocks that carries the memory; autodiff gives the gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear_attention.blocks import (
    BlockMasks,
    block_masks_by_segment,
    block_masks_in_row,
    block_sums,
    divisor,
    joined,
)
from pallas_kernels.linear_attention.problem import LinearPlan, LinearProblem, Memory, PackedBlocks
from pallas_kernels.precision import quotient

BLOCK = 64


def forward(problem: LinearProblem, plan: LinearPlan) -> tuple[Float[Array, "B T H E"], Memory]:
    """Outputs, and the memory after the rows."""
    batch, length, heads, _ = problem.queries.shape
    queries, keys, values = (_in_blocks(each, plan) for each in problem[:3])
    if problem.segment_ids is not None:
        there = _in_blocks(problem.segment_ids > 0, plan)[..., None, None]
        queries, keys, values = (jnp.where(there, each, 0) for each in (queries, keys, values))
    queries = queries.reshape(*keys.shape[:-1], -1, keys.shape[-1])

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def step(memory: Memory, block: tuple[Array, Array, Array, BlockMasks]) -> tuple[Memory, Array]:
        queries, keys, values, masks = block
        over_share = jax.vmap(block_sums, in_axes=(1, None, None, None, None, None, None), out_axes=1)
        over_heads = jax.vmap(over_share, in_axes=(1, 1, 1, 0, 0, _axis(problem), None), out_axes=1)
        over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, 0, 0, None, _by_row(problem)))
        normaliser = memory.keys[:, :, None]
        sums, totals = over_rows(queries, keys, values, memory.values, normaliser, problem.log_decay, masks)
        outputs = sums if plan.floor is None else quotient(sums, divisor(totals, plan.floor))
        joining = jax.vmap(joined, in_axes=(1, 1, 0, 0, _axis(problem), None))
        joining = jax.vmap(joining, in_axes=(0, 0, 0, 0, None, _by_row(problem)))
        after, normaliser = joining(keys, values, memory.values, normaliser, problem.log_decay, masks)
        return Memory(after, normaliser[:, :, 0]), outputs.astype(problem.values.dtype)

    after, outputs = jax.lax.scan(step, problem.start, (queries, keys, values, _masks(problem, plan)))
    outputs = jnp.moveaxis(outputs, 0, 1).reshape(batch, plan.blocks * plan.block, heads, -1)
    return outputs[:, :length], after


def _axis(problem: LinearProblem) -> int | None:
    return None if problem.log_decay is None else 0


def _by_row(problem: LinearProblem) -> int | None:
    return None if problem.segment_ids is None else 0


def _in_blocks(rows: Array, plan: LinearPlan) -> Array:
    """`[n, B, C, ...]` blocks of rows `[B, T, ...]`, with zeros behind them."""
    pad = ((0, 0), (0, plan.blocks * plan.block - plan.length), *((0, 0),) * (rows.ndim - 2))
    blocks = jnp.pad(rows, pad).reshape(rows.shape[0], plan.blocks, plan.block, *rows.shape[2:])
    return jnp.moveaxis(blocks, 1, 0)


def _masks(problem: LinearProblem, plan: LinearPlan) -> BlockMasks:
    """Masks `[n]` of all blocks, or `[n, B]` by row."""
    blocks = jnp.arange(plan.blocks, dtype=jnp.int32)
    if problem.segment_ids is None:
        return jax.vmap(partial(block_masks_in_row, plan=plan))(blocks)
    packed = PackedBlocks.of(problem.segment_ids, plan)
    rows = jnp.moveaxis(_in_blocks(jnp.moveaxis(packed.rows, 1, 2), plan), 2, 3)
    carried, clock = ((part[:, :-1].T, part[:, 1:].T) for part in (packed.carried, packed.clock))
    over_rows = jax.vmap(partial(block_masks_by_segment, plan=plan), in_axes=(None, 0, 0, 0))
    return jax.vmap(over_rows)(blocks, rows, carried, clock)
