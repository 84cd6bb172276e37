"""Triton kernels of verification by a window and a memory: features of rows first, then outputs of the nodes.

Both take sizes of heads and features a piece at a time, so that registers suffice for heads of any size. Keys have
features only in tiles that a node stands beyond the window of, which is seldom.
"""

import triton
import triton.language as tl

from pallas_kernels.gpu.blocks import (
    load_joined,
    load_memory,
    load_rows,
    memory_product,
    narrowed,
    product,
    store_rows,
)

NEAR, FAR = tl.constexpr(1), tl.constexpr(2)
LOWEST = tl.constexpr(-1e30)
# Keys' exponents are capped here, so that float32 holds sums of products of features.
LARGEST_EXPONENT = tl.constexpr(40.0)


@triton.jit
def exponents_of(
    rows,
    ring,
    weights,
    biases,
    halves,
    batch,
    begin,
    there,
    count,
    head,
    chosen,
    HEADS: tl.constexpr,
    RING: tl.constexpr,
    ROOT: tl.constexpr,
    D: tl.constexpr,
    PART_D: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    HEDGEHOG: tl.constexpr,
):
    """Exponents `[n, directions]` of rows, from `weights [heads, m, D]` and `biases [heads, m]` (Hedgehog has none)."""
    found = tl.zeros([there.shape[0], chosen.shape[0]], tl.float32)
    for piece in range(0, D, PART_D):
        inner = piece + tl.arange(0, PART_D)
        some = load_joined(rows, ring, batch, begin, inner, there, count, head, HEADS, D, RING, RING > 0)
        weight = load_memory(weights, head, chosen, inner, DIRECTIONS, D)
        if weight.dtype == some.dtype:
            found += product(some, tl.trans(weight))
        else:
            found += memory_product(some, tl.trans(weight))
    if not HEDGEHOG:
        bias = tl.load(biases + head * DIRECTIONS + chosen, mask=chosen < DIRECTIONS, other=0.0)
        found = ROOT * found + bias[None, :] - halves[:, None]
    return found


@triton.jit
def window_features_kernel(
    rows,
    ring,
    weights,
    biases,
    crossed,
    count,
    features,
    scales,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PART_D: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    PART_M: tl.constexpr,
    RING: tl.constexpr,
    TILE: tl.constexpr,
    SCALE: tl.constexpr,
    ROOT: tl.constexpr,
    NORMAL: tl.constexpr,
    HEDGEHOG: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Features `[B, RING + N, heads, M]` of rows `[B, N, heads, D]` behind those of a ring `[B, RING, heads, D]`.

    Of queries, `scales [B, heads, N]` are the logarithms of what they were divided by. Of keys, tiles are left out that
    no query scores by features: `crossed [B, RING + N]` is 0 for their rows.
    """
    begin = tl.program_id(0) * TILE - RING
    head, batch = tl.program_id(1), tl.program_id(2)
    M: tl.constexpr = 2 * DIRECTIONS if HEDGEHOG else DIRECTIONS
    slots = begin + tl.arange(0, TILE)
    there = slots < count
    needed = 1
    if not QUERIES:
        needed = tl.max(tl.load(crossed + batch * (RING + count) + RING + slots, mask=there, other=0), axis=0)
    if needed > 0:
        halves = tl.zeros([TILE], tl.float32)
        if not HEDGEHOG:
            for piece in range(0, D, PART_D):
                inner = piece + tl.arange(0, PART_D)
                some = load_joined(rows, ring, batch, begin, inner, there, count, head, HEADS, D, RING, RING > 0)
                wide = some.to(tl.float32)
                halves += SCALE / 2 * tl.sum(wide * wide, axis=1)
        largest = tl.full([TILE], LOWEST, tl.float32)
        total = tl.zeros([TILE], tl.float32)
        if HEDGEHOG or QUERIES:
            for piece in range(0, DIRECTIONS, PART_M):
                chosen = piece + tl.arange(0, PART_M)
                found = exponents_of(
                    rows,
                    ring,
                    weights,
                    biases,
                    halves,
                    batch,
                    begin,
                    there,
                    count,
                    head,
                    chosen,
                    HEADS,
                    RING,
                    ROOT,
                    D,
                    PART_D,
                    DIRECTIONS,
                    HEDGEHOG,
                )
                known = (chosen < DIRECTIONS)[None, :]
                some = tl.where(known, tl.abs(found) if HEDGEHOG else found, LOWEST)
                top = tl.maximum(largest, tl.max(some, axis=1))
                if HEDGEHOG:
                    both = tl.exp(found - top[:, None]) + tl.exp(-found - top[:, None])
                    total = total * tl.exp(largest - top) + tl.sum(tl.where(known, both, 0.0), axis=1)
                largest = top
        for piece in range(0, DIRECTIONS, PART_M):
            chosen = piece + tl.arange(0, PART_M)
            found = exponents_of(
                rows,
                ring,
                weights,
                biases,
                halves,
                batch,
                begin,
                there,
                count,
                head,
                chosen,
                HEADS,
                RING,
                ROOT,
                D,
                PART_D,
                DIRECTIONS,
                HEDGEHOG,
            )
            place = features + (((batch * (RING + count) + begin + RING).to(tl.int64) * HEADS + head) * M)
            offset = tl.arange(0, TILE)[:, None] * (HEADS * M) + chosen[None, :]
            mask = there[:, None] & (chosen < DIRECTIONS)[None, :]
            if HEDGEHOG:
                for half in tl.static_range(0, 2):
                    raised = tl.exp((1 - 2 * half) * found - largest[:, None]) / total[:, None]
                    stored = narrowed(raised, features.dtype.element_ty)
                    tl.store(place + half * DIRECTIONS + offset, stored, mask=mask)
            else:
                if QUERIES:
                    raised = tl.exp(found - largest[:, None])
                else:
                    raised = tl.exp(tl.minimum(found, LARGEST_EXPONENT) - NORMAL)
                tl.store(place + offset, narrowed(raised, features.dtype.element_ty), mask=mask)
        if QUERIES:
            scale = tl.zeros([TILE], tl.float32) if HEDGEHOG else largest - NORMAL
            tl.store(scales + (batch * HEADS + head) * count + slots, scale, mask=there)


@triton.jit
def load_kinds(pairs, rows, slots, nodes, count, there, RING: tl.constexpr):
    """The kinds of pairs of nodes with sinks and nodes, or with slots of the ring below 0."""
    inside = (rows < nodes)[:, None] & there[None, :]
    return tl.load(pairs + rows[:, None] * (RING + count) + RING + slots[None, :], mask=inside, other=0)


@triton.jit
def window_verify_kernel(
    queries,
    keys,
    values,
    ring_keys,
    ring_values,
    memory,
    query_features,
    key_features,
    scales,
    balance,
    pairs,
    clock,
    nodes,
    count,
    outputs,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    PART_D: tl.constexpr,
    PART_M: tl.constexpr,
    PART_E: tl.constexpr,
    PARTS: tl.constexpr,
    RING: tl.constexpr,
    TILE: tl.constexpr,
    NODES: tl.constexpr,
    SCALE: tl.constexpr,
    DECAYED: tl.constexpr,
):
    """Outputs `[B, N, H, E]`: some nodes of one query head, some of the values' columns.

    `keys` and `values` have `count` rows: sinks, and then the nodes. `memory [B, K, M, E + 1]` has the normaliser
    behind the values, `pairs [B, N, RING + count]` are 1 for near ones and 2 for far ones, `clock [B, K, RING + count]`
    has sums of the logarithms of decay since the memory's last token.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // SHARE
    KV_HEADS: tl.constexpr = HEADS // SHARE
    begin = tile * NODES
    rows = begin + tl.arange(0, NODES)
    there = rows < nodes
    columns = part * PART_E + tl.arange(0, PART_E)
    kinds = pairs + batch * nodes * (RING + count)
    lane = batch * KV_HEADS + kv_head
    times = clock + lane * (RING + count) + RING

    found = tl.zeros([NODES, PART_E], tl.float32)
    total = tl.zeros([NODES], tl.float32)
    for piece in range(0, M, PART_M):
        chosen = piece + tl.arange(0, PART_M)
        asked = load_rows(query_features, batch, begin, chosen, there, nodes, head, HEADS, M)
        found += memory_product(asked, load_memory(memory, lane, chosen, columns, M, E + 1))
        sums = memory + lane.to(tl.int64) * (M * (E + 1)) + chosen * (E + 1) + E
        total += tl.sum(asked.to(tl.float32) * tl.load(sums, mask=chosen < M, other=0.0)[None, :], axis=1)
    age = tl.zeros([NODES], tl.float32)
    if DECAYED:
        age = tl.load(times + count - nodes + rows, mask=there, other=0.0)
        found *= tl.exp(age)[:, None]
        total *= tl.exp(age)

    for first in range(-RING, count, TILE):
        slots = first + tl.arange(0, TILE)
        held = slots < count
        far = load_kinds(kinds, rows, slots, nodes, count, held, RING) == FAR
        if tl.max(tl.max(far.to(tl.int32), axis=1), axis=0) > 0:
            scores = tl.zeros([NODES, TILE], tl.float32)
            for piece in range(0, M, PART_M):
                chosen = piece + tl.arange(0, PART_M)
                asked = load_rows(query_features, batch, begin, chosen, there, nodes, head, HEADS, M)
                other = load_rows(key_features, batch, first + RING, chosen, held, RING + count, kv_head, KV_HEADS, M)
                scores += product(asked, tl.trans(other))
            if DECAYED:
                since = tl.load(times + slots, mask=held, other=0.0)
                scores *= tl.exp(tl.where(far, age[:, None] - since[None, :], 0.0))
            scores = tl.where(far, scores, 0.0)
            value = load_joined(
                values, ring_values, batch, first, columns, held, count, kv_head, KV_HEADS, E, RING, True
            )
            total += tl.sum(scores, axis=1)
            found += product(narrowed(scores, value.dtype), value)

    some = total > 0
    safe = tl.where(some, total, 1.0)
    scale = tl.load(scales + (batch * HEADS + head) * nodes + rows, mask=there, other=0.0) + tl.load(balance + head)
    found *= (1.0 / safe)[:, None]
    top = tl.where(some, scale + tl.log(safe), LOWEST)
    weight = tl.where(some, 1.0, 0.0)
    for first in range(-RING, count, TILE):
        slots = first + tl.arange(0, TILE)
        held = slots < count
        near = load_kinds(kinds, rows, slots, nodes, count, held, RING) == NEAR
        scores = tl.zeros([NODES, TILE], tl.float32)
        for piece in range(0, D, PART_D):
            inner = piece + tl.arange(0, PART_D)
            query = load_rows(queries, batch, begin, inner, there, nodes, head, HEADS, D)
            key = load_joined(keys, ring_keys, batch, first, inner, held, count, kv_head, KV_HEADS, D, RING, True)
            scores += product(query, tl.trans(key))
        scores = tl.where(near, SCALE * scores, LOWEST)
        value = load_joined(values, ring_values, batch, first, columns, held, count, kv_head, KV_HEADS, E, RING, True)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(near, tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(top - higher)
        weight = weight * shrink + tl.sum(weights, axis=1)
        found = found * shrink[:, None] + product(narrowed(weights, value.dtype), value)
        top = higher
    safe = tl.where(weight > 0, weight, 1.0)
    store_rows(outputs, found / safe[:, None], batch, begin, columns, there, nodes, head, HEADS, E)
