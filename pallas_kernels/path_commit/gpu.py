"""Committing a path on GPU: Triton folds finished groups into the memory where it lies, XLA writes the few slots."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu_launch import kernels_of, launch
from pallas_kernels.path_commit.xla import join, shift_window
from pallas_kernels.tiles import next_power, tiles_for
from pallas_kernels.tree_verify.problem import Held

KERNELS = "pallas_kernels.path_commit.gpu_kernels"


def commit(
    held: Held,
    keys: Float[Array, "B P K D"],
    values: Float[Array, "B P K E"],
    length: Int[Array, " B"],
    *,
    interpret: bool = False,
) -> Held:
    """The state after the first `length` tokens of the path."""
    batch, kv_heads, key_size, value_size = held.memory.shape
    group = held.keys.shape[1]
    tiles = tiles_for("path_commit", key_size, value_size, held.keys.dtype)
    tiles = replace(tiles, rows=min(tiles.rows, next_power(group)))
    path = keys.astype(held.keys.dtype), values.astype(held.values.dtype)
    (memory,) = launch(
        kernels_of(KERNELS, interpret).fold_kernel,
        (
            held.memory,
            held.keys,
            held.values,
            *path,
            held.position.astype(jnp.int32),
            length.astype(jnp.int32),
            keys.shape[1],
        ),
        (jax.ShapeDtypeStruct(held.memory.shape, held.memory.dtype),),
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
    joined = join((held.keys, held.values), held.position, path, length)
    window = None if held.window is None else shift_window(held.window, values, length)
    return Held(memory, *joined.buffer, window, joined.position)
