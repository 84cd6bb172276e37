"""Memories before blocks of rows on GPU, in order or in reverse: the first step of both linear attentions.

What each block adds is summed up for all blocks at once; only the sums themselves are gone through in order, for all
numbers of a memory side by side.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gpu.launch import kernels_of, launch
from pallas_kernels.tiles import Tiles, next_power

KERNELS = "pallas_kernels.gpu.blocks"
# Numbers of a memory that one program sums up: 16 bytes for each thread at a time.
RUNNING_PART, RUNNING_WARPS = 512, 4


class SummedRows(NamedTuple):
    """Arrays to be summed up; those that a kernel is told not to read may be anything.

    Attributes:
        left: `[B, T, H, D]`.
        right: `[B, T, H, E]`.
        first_left: `[B, P, H, D]` before the row.
        first_right: `[B, P, H, E]`.
        factors: `[H]` float32.
        weights: `[B, P + T]` or `[B, K, P + T]` float32, of the rows.
        keep: `[B, n]` or `[B, K, n]` float32, what each block leaves of the memory.
        extras: `[B, T, H]` float32, further weights of the sum of `left`.
        scales: `[B, H, T]` float32, what rows of `left` are multiplied by before all else; None for nothing.
    """

    left: Float[Array, "B T H D"]
    right: Float[Array, "B T H E"]
    first_left: Array
    first_right: Array
    factors: Array
    weights: Array
    keep: Array
    extras: Array | None = None
    scales: Array | None = None


class Memories(NamedTuple):
    """Float32 `sum left right^T` and `sum left`.

    Attributes:
        values: `[B, K, D, E]`, before blocks `[B, n, K, D, E]`.
        keys: `[B, K, D]`, before blocks `[B, n, K, D]`; anything if it is not summed.
    """

    values: Array
    keys: Array


@dataclass(frozen=True)
class Scan:
    """Order and blocks of a scan over rows.

    Attributes:
        length: rows T.
        block: rows of a block.
        blocks: number of blocks.
        shift: rows before a block that it takes instead of its last ones; the last block takes all.
        reverse: from the last block to the first.
    """

    length: int
    block: int
    blocks: int
    shift: int
    reverse: bool


def scan_memories(
    rows: SummedRows, initial: Memories, scan: Scan, *, tiles: Tiles, interpret: bool, **constants: bool
) -> tuple[Memories, Memories]:
    """The memories before each block, and the one after all of them.

    Args:
        rows: arrays to be summed up.
        initial: memories before the first block.
        scan: order and blocks.
        tiles: tile sizes.
        interpret: run the kernels in Triton's interpreter.
        constants: the kernels', by name; those that are not named are off.
    """
    batch, kv_heads, key_size, value_size = initial.values.shape
    heads, summed = rows.left.shape[2], constants.get("SUMMED", False)
    shapes = (batch, scan.blocks, *initial.values.shape[1:]), (batch, scan.blocks, kv_heads, key_size)
    outputs = shapes if summed else (shapes[0], (1,))
    off = dict.fromkeys(("UNIT", "FACTORS", "WEIGHTS", "AGED", "SUMMED", "ADDED", "EXTRAS", "STARTED"), False)
    flags = off | constants
    assert not flags["WEIGHTS"] or rows.keep.shape[0] == batch, "every row of the batch reads its own"
    nothing = jnp.zeros((1,))
    extras, scales = (nothing if each is None else each for each in (rows.extras, rows.scales))
    sums, left_sums = launch(
        kernels_of(KERNELS, interpret).block_sums_kernel,
        (*rows[:6], scales, extras, scan.length, scan.blocks),
        [jax.ShapeDtypeStruct(each, jnp.float32) for each in outputs],
        grid=(scan.blocks * -(-value_size // tiles.part), kv_heads, batch),
        constants={
            "HEADS": heads,
            "SHARE": heads // kv_heads,
            "D": key_size,
            "E": value_size,
            "WIDE_D": next_power(key_size),
            "PART_E": tiles.part,
            "BLOCK": scan.block,
            "BEFORE": scan.shift,
            "TILE": tiles.rows,
        }
        | flags,
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    run = partial(running_sums, keep=rows.keep, scan=scan, weights=flags["WEIGHTS"], interpret=interpret)
    before, after = run(sums, initial.values)
    before_sum, after_sum = run(left_sums, initial.keys) if summed else (nothing, nothing)
    return Memories(before, before_sum), Memories(after, after_sum)


def running_sums(
    sums: Array, initial: Array, *, keep: Array, scan: Scan, weights: bool, interpret: bool
) -> tuple[Array, Array]:
    """Running sums before every block and after the last, from each block's addition.

    They go to arrays of their own: a kernel that replaced the sums where they lie lost what it wrote for the first
    block, on an H200 with jax-triton 0.4.1 and Triton 3.6, whatever its stages.

    Args:
        sums: `[B, n, K, ...]` float32, what each block adds.
        initial: `[B, K, ...]`.
        keep: `[B, n]` or `[B, K, n]` float32, what each block leaves of what was there; not read without `weights`.
        scan: number of the blocks, and their order.
        weights: whether blocks leave less than everything.
        interpret: run the kernel in Triton's interpreter.
    """
    batch, kv_heads, *inner = initial.shape
    size = math.prod(inner)
    part = min(next_power(size), RUNNING_PART)
    before, after = launch(
        kernels_of(KERNELS, interpret).running_sums_kernel,
        (sums, initial.astype(jnp.float32), keep, scan.blocks),
        [jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in (sums, initial)],
        grid=(-(-size // part), kv_heads, batch),
        constants={
            "HEADS": kv_heads,
            "SIZE": size,
            "PART": part,
            "WEIGHTS": weights,
            "BY_HEAD": keep.ndim == 3,
            "REVERSE": scan.reverse,
        },
        warps=RUNNING_WARPS,
        stages=1,
        interpret=interpret,
    )
    return before, after
