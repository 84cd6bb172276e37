"""Memories before blocks of rows on GPU, in order or in reverse: what both linear attentions go through first."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gpu_launch import kernels_of, launch
from pallas_kernels.tiles import Tiles, next_power

KERNELS = "pallas_kernels.gpu_parts"


class Rows(NamedTuple):
    """What is summed up; what a kernel is told not to read may be anything.

    Attributes:
        left: `[B, T, H, D]`.
        right: `[B, T, H, E]`.
        first_left: `[B, P, H, D]` before the row.
        first_right: `[B, P, H, E]`.
        factors: `[H]` float32.
        weights: `[B, P + T]` or `[B, K, P + T]` float32, of the rows.
        keep: `[B, n]` or `[B, K, n]` float32, what each block leaves of the memory.
        extras: `[B, T, H]` float32, further weights of the sum of `left`.
    """

    left: Float[Array, "B T H D"]
    right: Float[Array, "B T H E"]
    first_left: Array
    first_right: Array
    factors: Array
    weights: Array
    keep: Array
    extras: Array | None = None


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
    """How rows are gone through.

    Attributes:
        length: rows T.
        block: rows of a block.
        blocks: how many there are.
        shift: rows before a block that it takes instead of its last ones; the last block takes all.
        reverse: from the last block to the first.
    """

    length: int
    block: int
    blocks: int
    shift: int
    reverse: bool


def scan_memories(
    rows: Rows, initial: Memories, scan: Scan, *, tiles: Tiles, interpret: bool, **constants: bool
) -> tuple[Memories, Memories]:
    """The memories that each block meets, and what is left after all of them.

    Args:
        rows: what is summed up.
        initial: what there is before.
        scan: how the rows are gone through.
        tiles: how the work is cut.
        interpret: run the kernel in Triton's interpreter.
        constants: the kernel's, by name; those that are not named are off.
    """
    shape = batch, kv_heads, key_size, value_size = initial.values.shape
    heads, summed = rows.left.shape[2], constants.get("SUMMED", False)
    sizes = (batch, scan.blocks, kv_heads, key_size), (batch, kv_heads, key_size)
    outputs = [(batch, scan.blocks, *shape[1:]), shape, *(sizes if summed else ((1,), (1,)))]
    off = dict.fromkeys(("UNIT", "FACTORS", "WEIGHTS", "AGED", "SUMMED", "ADDED", "EXTRAS", "STARTED"), False)
    extras = jnp.zeros((1,)) if rows.extras is None else rows.extras
    before, after, before_sum, after_sum = launch(
        kernels_of(KERNELS, interpret).memories_kernel,
        (*rows[:7], initial.values, extras, initial.keys, scan.length, scan.blocks),
        [jax.ShapeDtypeStruct(each, jnp.float32) for each in outputs],
        grid=(-(-value_size // tiles.part), kv_heads, batch),
        constants=off
        | {
            "HEADS": heads,
            "SHARE": heads // kv_heads,
            "D": key_size,
            "E": value_size,
            "WIDE_D": next_power(key_size),
            "PART_E": tiles.part,
            "BLOCK": scan.block,
            "BEFORE": scan.shift,
            "TILE": tiles.rows,
            "REVERSE": scan.reverse,
        }
        | constants,
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return Memories(before, before_sum), Memories(after, after_sum)
