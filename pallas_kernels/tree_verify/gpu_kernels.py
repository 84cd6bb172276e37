"""Triton kernel of tree verification: some nodes of one query head, on a part of the values' columns."""

import triton
import triton.language as tl

from pallas_kernels.gpu.blocks import (
    load_memory,
    load_rows,
    memory_product,
    narrowed,
    product,
    scaled,
    store_rows,
    unit_scale,
)


@triton.jit
def branch_weights(
    scores,
    branches,
    among,
    factor,
    nodes,
    count,
    rows,
    slots,
    tree_head,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    GROUPED: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """Weights of pairs of nodes with slots of the group, or with nodes (FIRST is then GROUP)."""
    inside = (rows < count)[:, None] & (slots < nodes)[None, :]
    wide = GROUP + count
    branch = tl.load(branches + rows[:, None] * wide + FIRST + slots[None, :], mask=inside, other=0)
    weights = tl.zeros_like(scores)
    if LOCAL:
        positive = tl.maximum(scores, 0.0)
        weights += tl.where(branch == 1, positive * positive, 0.0)
    if GROUPED:
        weights += tl.where(branch == 2, factor * scores, 0.0)
    if FILTERED:
        base = among + tree_head * count * count
        weights += tl.load(base + rows[:, None] * count + slots[None, :], mask=inside, other=0.0).to(tl.float32)
    return weights


@triton.jit
def verify_kernel(
    queries,
    keys,
    values,
    group_keys,
    group_values,
    memory,
    alpha,
    branches,
    window,
    into_window,
    among,
    count,
    outputs,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE_D: tl.constexpr,
    PART_D: tl.constexpr,
    PART_E: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE_WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    NODES: tl.constexpr,
    LOCAL: tl.constexpr,
    GROUPED: tl.constexpr,
    FILTERED: tl.constexpr,
    OWN_TREES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Outputs `[B, N, H, E]`.

    `branches [B, N, G + N]` says which branch a pair has, `among [1 or B, H, N, N]` and `into_window [1 or B, H, N, W -
    1]` are the convolution over nodes and over the `window [B, W - 1, K, E]`.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // SHARE
    KV_HEADS: tl.constexpr = HEADS // SHARE
    begin = tile * NODES
    rows = begin + tl.arange(0, NODES)
    there = rows < count
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    raw = load_rows(queries, batch, begin, inner, there, count, head, HEADS, D)
    scale = unit_scale(raw, UNIT)
    query = scaled(raw, scale, UNIT)
    factor = 0.0
    if GROUPED:
        factor = tl.load(alpha + head)
    tree_head = head
    if OWN_TREES:
        tree_head += batch * HEADS
    pairs = branches + batch * count * (GROUP + count)
    found = tl.zeros([NODES, PART_E], tl.float32)

    for first in range(0, GROUP, TILE):
        slots = first + tl.arange(0, TILE)
        key = load_rows(group_keys, batch, first, inner, slots < GROUP, GROUP, kv_head, KV_HEADS, D)
        value = load_rows(group_values, batch, first, columns, slots < GROUP, GROUP, kv_head, KV_HEADS, E)
        weights = branch_weights(
            product(query, tl.trans(key)),
            pairs,
            among,
            factor,
            GROUP,
            count,
            rows,
            slots,
            tree_head,
            GROUP,
            0,
            LOCAL,
            GROUPED,
            False,
        )
        found += product(narrowed(weights, value.dtype), value)
    for first in range(0, count, TILE):
        slots = first + tl.arange(0, TILE)
        own = load_rows(keys, batch, first, inner, slots < count, count, kv_head, KV_HEADS, D)
        own = scaled(own, unit_scale(own, UNIT), UNIT)
        value = load_rows(values, batch, first, columns, slots < count, count, kv_head, KV_HEADS, E)
        weights = branch_weights(
            product(query, tl.trans(own)),
            pairs,
            among,
            factor,
            count,
            count,
            rows,
            slots,
            tree_head,
            GROUP,
            GROUP,
            LOCAL,
            GROUPED,
            FILTERED,
        )
        found += product(narrowed(weights, value.dtype), value)

    if WINDOW > 0:
        slots = tl.arange(0, WIDE_WINDOW)
        value = load_rows(window, batch, 0 * begin, columns, slots < WINDOW, WINDOW, kv_head, KV_HEADS, E)
        base = into_window + tree_head * count * WINDOW
        inside = there[:, None] & (slots < WINDOW)[None, :]
        found += product(tl.load(base + rows[:, None] * WINDOW + slots[None, :], mask=inside, other=0.0), value)
    if GROUPED:
        read = tl.zeros([NODES, PART_E], tl.float32)
        for piece in range(0, WIDE_D, PART_D):
            chosen = piece + tl.arange(0, PART_D)
            some = load_rows(queries, batch, begin, chosen, there, count, head, HEADS, D)
            part_of_memory = load_memory(memory, batch * KV_HEADS + kv_head, chosen, columns, D, E)
            read += memory_product(scaled(some, scale, UNIT), part_of_memory)
        found += factor * read
    store_rows(outputs, found, batch, begin, columns, there, count, head, HEADS, E)
