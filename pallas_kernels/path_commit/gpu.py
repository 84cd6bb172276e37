"""Committing a path on GPU: Triton folds finished groups into the memory where it lies, XLA writes the few slots."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.gpu.launch import kernels_of, launch
from pallas_kernels.path_commit.xla import join, shift_window
from pallas_kernels.tiles import next_power, tiles_for
from pallas_kernels.types import AugmentedState, Nodes

KERNELS = "pallas_kernels.path_commit.gpu_kernels"


def commit(state: AugmentedState, path: Nodes, length: Int[Array, " B"], *, interpret: bool = False) -> AugmentedState:
    """The state after the first `length` nodes of the path."""
    assert state.memory is not None, "there is a memory to fold groups into"
    batch, kv_heads, key_size, value_size = state.memory.shape
    group = state.keys.shape[1]
    tiles = tiles_for("path_commit", key_size, value_size, state.keys.dtype)
    tiles = replace(tiles, rows=min(tiles.rows, next_power(group)))
    nodes = Nodes(path.keys.astype(state.keys.dtype), path.values.astype(state.values.dtype))
    (memory,) = launch(
        kernels_of(KERNELS, interpret).fold_kernel,
        (
            state.memory,
            state.keys,
            state.values,
            *nodes,
            state.position.astype(jnp.int32),
            length.astype(jnp.int32),
            path.keys.shape[1],
        ),
        (jax.ShapeDtypeStruct(state.memory.shape, state.memory.dtype),),
        grid=(-(-value_size // tiles.part), kv_heads, batch),
        constants={
            "HEADS": kv_heads,
            "D": key_size,
            "E": value_size,
            "WIDE_D": next_power(key_size),
            "PART_E": tiles.part,
            "GROUP": group,
            "TILE": tiles.rows,
        },
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
        aliases={0: 0},
    )
    joined = join((state.keys, state.values), state.position, nodes, length)
    window = None if state.window is None else shift_window(state.window, path.values, length)
    return AugmentedState(memory, *joined.buffer, window, joined.position)
