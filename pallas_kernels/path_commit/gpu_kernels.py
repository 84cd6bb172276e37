"""Triton kernel that folds groups which a path finishes into the memory, where it lies."""

import triton
import triton.language as tl

from pallas_kernels.gpu.blocks import load_memory, load_rows, product, store_memory


@triton.jit
def fold_kernel(
    memory,
    keys,
    values,
    path_keys,
    path_values,
    position,
    accepted,
    path,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE_D: tl.constexpr,
    PART_E: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds to `memory [B, K, D, E]` the group of rows whose path finishes it; other programs do nothing."""
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(position + batch) % GROUP
    length = tl.load(accepted + batch)
    if slot + length >= GROUP:
        inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
        found = load_memory(memory, batch * HEADS + head, inner, columns, D, E)
        for first in range(0, GROUP, TILE):
            slots = first + tl.arange(0, TILE)
            held = slots < slot
            new = (slots >= slot) & (slots < GROUP)
            key = load_rows(keys, batch, first, inner, held, GROUP, head, HEADS, D)
            key += load_rows(path_keys, batch, first - slot, inner, new, path, head, HEADS, D)
            value = load_rows(values, batch, first, columns, held, GROUP, head, HEADS, E)
            value += load_rows(path_values, batch, first - slot, columns, new, path, head, HEADS, E)
            found += product(tl.trans(key), value)
        store_memory(memory, found, batch * HEADS + head, inner, columns, D, E)
