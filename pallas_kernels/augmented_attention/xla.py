"""Augmented linear attention in plain XLA: all blocks side by side, the memories before them by a scan."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.augmented_attention import cpu
from pallas_kernels.augmented_attention.blocks import (
    WindowMasks,
    block_outputs,
    joining,
    unit_rows,
    window_masks_by_segment,
    window_masks_in_row,
)
from pallas_kernels.augmented_attention.problem import (
    AugmentedPlan,
    AugmentedProblem,
    PackedWindows,
    convolution_matrix,
)
from pallas_kernels.precision import accumulation_dtype


def plan_for(problem: AugmentedProblem, *, group: int, unit: bool, local: bool) -> AugmentedPlan:
    """Blocks and windows of a group, or of the convolution's reach where that is longer."""
    return AugmentedPlan.of(problem, group=group, unit=unit, local=local, block=group, multiple=1)


def forward(problem: AugmentedProblem, plan: AugmentedPlan) -> tuple[Float[Array, "B T H E"], Float[Array, "B K D E"]]:
    """Outputs, and the memory after the rows in float32 or better; autodiff gives the gradients, but on CPUs."""
    batch, length, heads, key_size = problem.queries.shape
    kv_heads, value_size = problem.values.shape[2:]
    prior, packed = problem.prior, problem.packed
    queries, keys, values = problem.queries, problem.keys, problem.values
    if packed is not None:
        there = (packed.segment_ids > 0)[:, :, None, None]
        keys, values = (jnp.where(there, each, 0) for each in (keys, values))
    masks, by_row = _masks(problem, plan)
    initial = jnp.zeros((batch, kv_heads, key_size, value_size), accumulation_dtype(values.dtype))
    if prior is not None:
        initial = prior.memory.astype(initial.dtype)
    if cpu.suits(problem):
        present = problem._replace(keys=keys, values=values)
        return cpu.forward(present, plan, masks, _matrices(problem, plan), initial)
    first_keys, first_values = (None, None) if prior is None else (prior.keys, prior.values)
    if plan.unit:
        queries, keys = unit_rows(queries), unit_rows(keys)
    windows = _windows(keys, first_keys, plan), _windows(values, first_values, plan)
    over_heads = jax.vmap(joining, in_axes=(1, 1, None))
    updates = jax.vmap(jax.vmap(over_heads), in_axes=(0, 0, by_row))(*windows, masks)
    before, after = _memories(updates, jnp.broadcast_to(masks.keep, updates.shape[:2]), initial)

    over_share = jax.vmap(partial(block_outputs, plan=plan), in_axes=(1, None, None, 0, 0, None, None), out_axes=1)
    over_heads = jax.vmap(over_share, in_axes=(1, 1, 1, 0, 0, 0, None), out_axes=1)
    over_blocks = jax.vmap(over_heads, in_axes=(0, 0, 0, None, None, 0, 0))
    over_rows = jax.vmap(over_blocks, in_axes=(0, 0, 0, None, None, 0, by_row))
    padded = jnp.pad(queries, ((0, 0), (0, plan.blocks * plan.block - length), (0, 0), (0, 0)))
    outputs = over_rows(
        padded.reshape(batch, plan.blocks, plan.block, kv_heads, -1, key_size),
        *windows,
        None if problem.alpha is None else problem.alpha.astype(before.dtype).reshape(kv_heads, -1),
        _matrices(problem, plan),
        before,
        masks,
    )
    outputs = outputs.reshape(batch, -1, heads, value_size)[:, :length]
    return outputs.astype(problem.values.dtype), after


def _windows(rows: Float[Array, "B T K D"], first: Float[Array, "B P K D"] | None, plan: AugmentedPlan) -> Array:
    """Windows `[B, n, M, K, D]` of rows, with `first` or zeros before them."""
    pad = ((0, 0), (plan.before if first is None else 0, plan.blocks * plan.block - plan.length), (0, 0), (0, 0))
    rows = rows if first is None else jnp.concatenate([first.astype(rows.dtype), rows], axis=1)
    pieces = jnp.pad(rows, pad).reshape(rows.shape[0], -1, plan.before, *rows.shape[2:])
    ratio = plan.block // plan.before
    ends = plan.blocks * ratio
    return jnp.concatenate([pieces[:, shift : shift + ends : ratio] for shift in range(ratio + 1)], axis=2)


def _masks(problem: AugmentedProblem, plan: AugmentedPlan) -> tuple[WindowMasks, int | None]:
    """Masks `[n]` of all blocks, or `[B, n]` by row, and the axis of the rows."""
    blocks = jnp.arange(plan.blocks, dtype=jnp.int32)
    if problem.packed is None:
        return jax.vmap(partial(window_masks_in_row, plan=plan))(blocks), None
    packed = PackedWindows.of(problem.packed, problem.prior, plan)
    tokens = jnp.moveaxis(packed.rows, 1, 2)[..., None]
    windows = _windows(tokens, jnp.moveaxis(packed.first, 1, 2)[..., None], plan)[..., 0]
    over_blocks = jax.vmap(partial(window_masks_by_segment, plan=plan), in_axes=(0, 0, (0, 0, None), None))
    over_rows = jax.vmap(over_blocks, in_axes=(None, 0, (0, 0, 0), 0))
    carried = packed.carried[:, :-1], packed.carried[:, 1:], packed.carried[:, -1]
    return over_rows(blocks, jnp.swapaxes(windows, 2, 3), carried, packed.finished), 0


def _memories(
    updates: Float[Array, "B n K D E"], keep: Array, initial: Float[Array, "B K D E"]
) -> tuple[Float[Array, "B n K D E"], Float[Array, "B K D E"]]:
    """The memory before each block, and after the last."""

    def step(memory: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        update, kept = block
        return jnp.where(kept[:, None, None, None], memory, 0) + update, memory

    after, before = jax.lax.scan(step, initial, (jnp.moveaxis(updates, 1, 0), keep.T))
    return jnp.moveaxis(before, 0, 1), after


def _matrices(problem: AugmentedProblem, plan: AugmentedPlan) -> Float[Array, "K R C M"] | None:
    if problem.taps is None:
        return None
    matrix = convolution_matrix(problem.taps.astype(problem.values.dtype), plan)
    return matrix.reshape(problem.values.shape[2], -1, *matrix.shape[1:])
