"""Linear attention in plain XLA: a scan over blocks that carries the memory; autodiff gives the gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear_attention.blocks import (
    Place,
    block_sums,
    divisor,
    joined,
    place_by_document,
    place_in_row,
)
from pallas_kernels.linear_attention.problem import Memory, Placed, Plan, Problem

BLOCK = 64


def forward(problem: Problem, plan: Plan) -> tuple[Float[Array, "B T H E"], Memory]:
    """Outputs, and the memory after the rows."""
    batch, length, heads, _ = problem.queries.shape
    queries, keys, values = (_in_blocks(each, plan) for each in problem[:3])
    if problem.documents is not None:
        there = _in_blocks(problem.documents > 0, plan)[..., None, None]
        queries, keys, values = (jnp.where(there, each, 0) for each in (queries, keys, values))
    queries = queries.reshape(*keys.shape[:-1], -1, keys.shape[-1])

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def step(memory: Memory, block: tuple[Array, Array, Array, Place]) -> tuple[Memory, Array]:
        queries, keys, values, place = block
        over_share = jax.vmap(block_sums, in_axes=(1, None, None, None, None, None, None), out_axes=1)
        over_heads = jax.vmap(over_share, in_axes=(1, 1, 1, 0, 0, _axis(problem), None), out_axes=1)
        over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, 0, 0, None, _by_row(problem)))
        normaliser = memory.keys[:, :, None]
        sums, totals = over_rows(queries, keys, values, memory.values, normaliser, problem.log_decay, place)
        outputs = sums if plan.floor is None else sums / divisor(totals, plan.floor)
        joining = jax.vmap(joined, in_axes=(1, 1, 0, 0, _axis(problem), None))
        joining = jax.vmap(joining, in_axes=(0, 0, 0, 0, None, _by_row(problem)))
        after, normaliser = joining(keys, values, memory.values, normaliser, problem.log_decay, place)
        return Memory(after, normaliser[:, :, 0]), outputs.astype(problem.values.dtype)

    after, outputs = jax.lax.scan(step, problem.start, (queries, keys, values, _places(problem, plan)))
    outputs = jnp.moveaxis(outputs, 0, 1).reshape(batch, plan.blocks * plan.block, heads, -1)
    return outputs[:, :length], after


def _axis(problem: Problem) -> int | None:
    return None if problem.log_decay is None else 0


def _by_row(problem: Problem) -> int | None:
    return None if problem.documents is None else 0


def _in_blocks(rows: Array, plan: Plan) -> Array:
    """`[n, B, C, ...]` blocks of rows `[B, T, ...]`, with zeros behind them."""
    pad = ((0, 0), (0, plan.blocks * plan.block - plan.length), *((0, 0),) * (rows.ndim - 2))
    blocks = jnp.pad(rows, pad).reshape(rows.shape[0], plan.blocks, plan.block, *rows.shape[2:])
    return jnp.moveaxis(blocks, 1, 0)


def _places(problem: Problem, plan: Plan) -> Place:
    """The places `[n]` of all blocks, or `[n, B]` by row."""
    blocks = jnp.arange(plan.blocks, dtype=jnp.int32)
    if problem.documents is None:
        return jax.vmap(partial(place_in_row, plan=plan))(blocks)
    placed = Placed.of(problem.documents, plan)
    rows = jnp.moveaxis(_in_blocks(jnp.moveaxis(placed.rows, 1, 2), plan), 2, 3)
    carried, clock = ((part[:, :-1].T, part[:, 1:].T) for part in (placed.carried, placed.clock))
    over_rows = jax.vmap(partial(place_by_document, plan=plan), in_axes=(None, 0, 0, 0))
    return jax.vmap(over_rows)(blocks, rows, carried, clock)
