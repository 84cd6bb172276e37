"""Committing a path on TPU: one Pallas program for a row and a few heads, which changes the state where it lies.

The memory stays in HBM; a program fetches its part only if the path finishes a group.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.products import present, product
from pallas_kernels.tpu_heads import VMEM_BYTES, Heads, Ref, side_by_side
from pallas_kernels.tree_verify.problem import Held


def commit(
    held: Held,
    keys: Float[Array, "B P K D"],
    values: Float[Array, "B P K E"],
    length: Int[Array, " B"],
    *,
    interpret: Any = False,
) -> Held:
    """The state after the first `length` tokens of the path."""
    batch, path, kv_heads, _ = keys.shape
    heads = Heads.of(keys, values)
    key, value = heads.together * heads.key_size, heads.together * heads.value_size
    window = None if held.window is None or held.window.shape[1] == 0 else side_by_side(held.window)
    state = [side_by_side(held.keys), side_by_side(held.values), held.memory, *([] if window is None else [window])]
    specs = [
        _columns(held.keys.shape[1], key),
        _columns(held.values.shape[1], value),
        pl.BlockSpec(memory_space=pl.ANY),
        *([] if window is None else [_columns(window.shape[1], value)]),
    ]
    scalars = [held.position.astype(jnp.int32), length.astype(jnp.int32)]
    found = pl.pallas_call(
        lambda *refs: _kernel(*refs, heads=heads, windowed=window is not None),
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in state],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads // heads.together),
            in_specs=[_columns(path, key), _columns(path, value), *specs],
            out_specs=specs,
            scratch_shapes=[
                pltpu.VMEM((heads.together, heads.key_size, heads.value_size), held.memory.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        # The state begins behind the scalars and the path.
        input_output_aliases={4 + index: index for index in range(len(state))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="commit_path",
    )(*scalars, side_by_side(keys).astype(held.keys.dtype), side_by_side(values).astype(held.values.dtype), *state)
    return Held(
        memory=found[2],
        keys=found[0].reshape(held.keys.shape),
        values=found[1].reshape(held.values.shape),
        window=held.window if window is None or held.window is None else found[3].reshape(held.window.shape),
        position=held.position + length.astype(held.position.dtype),
    )


def _kernel(
    positions: Ref, lengths: Ref, path_keys: Ref, path_values: Ref, *refs: Ref, heads: Heads, windowed: bool
) -> None:
    count = 4 if windowed else 3
    before, after, (fetched, arrived) = refs[:count], refs[count : 2 * count], refs[2 * count :]
    row, part = pl.program_id(0), pl.program_id(1)
    group, length = before[0].shape[0], lengths[row]
    slot = jax.lax.rem(positions[row], jnp.int32(group))
    steps = jax.lax.broadcasted_iota(jnp.int32, (path_keys.shape[0], 1), 0)
    new = [present(each[...], steps < length) for each in (path_keys, path_values)]
    begun = [_placed(rows, old[...], slot, length) for rows, old in zip(new, before[:2], strict=True)]

    @pl.when(slot + length >= group)
    def _() -> None:
        own = pl.ds(part * heads.together, heads.together)
        fetch = pltpu.make_async_copy(before[2].at[row, own], fetched, arrived)
        fetch.start()
        fetch.wait()
        for head in range(heads.together):
            keys, values = begun[0][:, heads.keys(head)], begun[1][:, heads.values(head)]
            fetched[head] += product(keys, values, (0, 0))
        send = pltpu.make_async_copy(fetched, after[2].at[row, own], arrived)
        send.start()
        send.wait()

    for rows, old, out in zip(new, begun, after[:2], strict=True):
        out[...] = _placed(rows, old, slot - group, length)
    if windowed:
        window = before[3][...]
        width = window.shape[0]
        moved = _picked(window, jax.lax.broadcasted_iota(jnp.int32, (width, 1), 0) + length)
        after[3][...] = _placed(new[1], moved, width - length, length)


def _placed(path: jax.Array, old: jax.Array, slot: jax.Array, length: jax.Array) -> jax.Array:
    """Rows with those of a path from a slot on; what does not fit is left out."""
    step = jax.lax.broadcasted_iota(jnp.int32, (old.shape[0], 1), 0) - slot
    return jnp.where((step >= 0) & (step < length), _picked(path, step), old)


def _picked(rows: jax.Array, index: jax.Array) -> jax.Array:
    """The rows of a column of numbers, zero where there is none: a product with zeros and ones rounds nothing."""
    chosen = jax.lax.broadcasted_iota(jnp.int32, (index.shape[0], rows.shape[0]), 1) == index
    return product(chosen.astype(rows.dtype), rows, (1, 0)).astype(rows.dtype)


def _columns(rows: int, columns: int) -> pl.BlockSpec:
    """All rows, of the program's heads."""
    return pl.BlockSpec((None, rows, columns), lambda b, k, *_: (b, 0, k))
