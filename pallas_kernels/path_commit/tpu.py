"""Committing a path on TPU: one Pallas program for a row and a few heads, which changes the state where it lies.

The memory stays in HBM; a program fetches its part only if the path finishes a group.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.products import matmul, zero_absent
from pallas_kernels.tpu.heads import VMEM_BYTES, ProgramHeads, Ref, all_rows, flatten_heads
from pallas_kernels.types import AugmentedState, Nodes


def commit(state: AugmentedState, path: Nodes, length: Int[Array, " B"], *, interpret: Any = False) -> AugmentedState:
    """The state after the first `length` nodes of the path."""
    assert state.memory is not None, "there is a memory to fold groups into"
    batch, nodes, kv_heads, _ = path.keys.shape
    heads = ProgramHeads.of(path.keys, path.values)
    key, value = heads.together * heads.key_size, heads.together * heads.value_size
    window = None if state.window is None or state.window.shape[1] == 0 else flatten_heads(state.window)
    arrays = [
        flatten_heads(state.keys),
        flatten_heads(state.values),
        state.memory,
        *([] if window is None else [window]),
    ]
    specs = [
        all_rows(state.keys.shape[1], key),
        all_rows(state.values.shape[1], value),
        pl.BlockSpec(memory_space=pl.ANY),
        *([] if window is None else [all_rows(window.shape[1], value)]),
    ]
    scalars = [state.position.astype(jnp.int32), length.astype(jnp.int32)]
    found = pl.pallas_call(
        lambda *refs: _kernel(*refs, heads=heads, windowed=window is not None),
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arrays],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads // heads.together),
            in_specs=[all_rows(nodes, key), all_rows(nodes, value), *specs],
            out_specs=specs,
            scratch_shapes=[
                pltpu.VMEM((heads.together, heads.key_size, heads.value_size), state.memory.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        # The state begins behind the scalars and the path.
        input_output_aliases={4 + index: index for index in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="commit_path",
    )(
        *scalars,
        flatten_heads(path.keys).astype(state.keys.dtype),
        flatten_heads(path.values).astype(state.values.dtype),
        *arrays,
    )
    return AugmentedState(
        memory=found[2],
        keys=found[0].reshape(state.keys.shape),
        values=found[1].reshape(state.values.shape),
        window=state.window if window is None or state.window is None else found[3].reshape(state.window.shape),
        position=state.position + length.astype(state.position.dtype),
    )


def _kernel(
    positions: Ref, lengths: Ref, path_keys: Ref, path_values: Ref, *refs: Ref, heads: ProgramHeads, windowed: bool
) -> None:
    count = 4 if windowed else 3
    before, after, (fetched, arrived) = refs[:count], refs[count : 2 * count], refs[2 * count :]
    row, part = pl.program_id(0), pl.program_id(1)
    group, length = before[0].shape[0], lengths[row]
    slot = jax.lax.rem(positions[row], jnp.int32(group))
    steps = jax.lax.broadcasted_iota(jnp.int32, (path_keys.shape[0], 1), 0)
    new = [zero_absent(each[...], steps < length) for each in (path_keys, path_values)]
    begun = [_placed(rows, old[...], slot, length) for rows, old in zip(new, before[:2], strict=True)]

    @pl.when(slot + length >= group)
    def _() -> None:
        own = pl.ds(part * heads.together, heads.together)
        fetch = pltpu.make_async_copy(before[2].at[row, own], fetched, arrived)
        fetch.start()
        fetch.wait()
        for head in range(heads.together):
            keys, values = begun[0][:, heads.keys(head)], begun[1][:, heads.values(head)]
            fetched[head] += matmul(keys, values, (0, 0))
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
    """Rows with those of a path written from a slot on; rows that do not fit are left out."""
    step = jax.lax.broadcasted_iota(jnp.int32, (old.shape[0], 1), 0) - slot
    return jnp.where((step >= 0) & (step < length), _picked(path, step), old)


def _picked(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Rows picked by a column of numbers, zero where there is none: a product with zeros and ones rounds nothing."""
    chosen = jax.lax.broadcasted_iota(jnp.int32, (index.shape[0], rows.shape[0]), 1) == index
    return matmul(chosen.astype(rows.dtype), rows, (1, 0)).astype(rows.dtype)
