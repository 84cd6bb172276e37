"""Triton kernel of verification by a window and a memory: some nodes of one query head, some of the values' columns.

Features are taken inside, a piece of the map at a time: what a softmax over them subtracts and divides by comes first.
Keys of the ring have features only in tiles that a node stands beyond the window of, which is seldom.
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
    weights,
    biases,
    head,
    chosen,
    inner,
    SCALE: tl.constexpr,
    ROOT: tl.constexpr,
    D: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    HEDGEHOG: tl.constexpr,
):
    """Exponents `[n, directions]` of rows, from `weights [heads, m, D]` and `biases [heads, m]` (Hedgehog has none)."""
    weight = load_memory(weights, head, chosen, inner, DIRECTIONS, D)
    if weight.dtype == rows.dtype:
        found = product(rows, tl.trans(weight))
    else:
        found = memory_product(rows, tl.trans(weight))
    if not HEDGEHOG:
        wide = rows.to(tl.float32)
        bias = tl.load(biases + head * DIRECTIONS + chosen, mask=chosen < DIRECTIONS, other=0.0)
        found = ROOT * found + bias[None, :] - (SCALE / 2 * tl.sum(wide * wide, axis=1))[:, None]
    return found


@triton.jit
def softmax_of_map(
    rows,
    weights,
    biases,
    head,
    inner,
    SCALE: tl.constexpr,
    ROOT: tl.constexpr,
    D: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    WIDE_M: tl.constexpr,
    PART_M: tl.constexpr,
    HEDGEHOG: tl.constexpr,
):
    """The largest exponent `[n]` of each row, of both signs with Hedgehog, and then the sum of all exponentials."""
    largest = tl.full([rows.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([rows.shape[0]], tl.float32)
    for piece in range(0, WIDE_M, PART_M):
        chosen = piece + tl.arange(0, PART_M)
        found = exponents_of(rows, weights, biases, head, chosen, inner, SCALE, ROOT, D, DIRECTIONS, HEDGEHOG)
        there = (chosen < DIRECTIONS)[None, :]
        some = tl.where(there, tl.abs(found) if HEDGEHOG else found, LOWEST)
        top = tl.maximum(largest, tl.max(some, axis=1))
        if HEDGEHOG:
            both = tl.exp(found - top[:, None]) + tl.exp(-found - top[:, None])
            total = total * tl.exp(largest - top) + tl.sum(tl.where(there, both, 0.0), axis=1)
        largest = top
    return largest, total


@triton.jit
def features_of(
    exponents,
    chosen,
    largest,
    total,
    SIGN: tl.constexpr,
    QUERIES: tl.constexpr,
    NORMAL: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    HEDGEHOG: tl.constexpr,
):
    """Features `[n, directions]`, zero where there is no direction; a SIGN's with Hedgehog."""
    if HEDGEHOG:
        found = tl.exp(SIGN * exponents - largest[:, None]) / total[:, None]
    elif QUERIES:
        found = tl.exp(exponents - largest[:, None])
    else:
        found = tl.exp(tl.minimum(exponents, LARGEST_EXPONENT) - NORMAL)
    return tl.where((chosen < DIRECTIONS)[None, :], found, 0.0)


@triton.jit
def feature_products(
    query,
    key,
    largest,
    divisor,
    query_map,
    query_bias,
    key_map,
    key_bias,
    head,
    kv_head,
    inner,
    SCALE: tl.constexpr,
    ROOT: tl.constexpr,
    NORMAL: tl.constexpr,
    D: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    WIDE_M: tl.constexpr,
    PART_M: tl.constexpr,
    HEDGEHOG: tl.constexpr,
):
    """Products `[queries, keys]` of features."""
    held, held_sum = largest, divisor
    if HEDGEHOG:
        held, held_sum = softmax_of_map(
            key, key_map, key_bias, kv_head, inner, SCALE, ROOT, D, DIRECTIONS, WIDE_M, PART_M, HEDGEHOG
        )
    found = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    for piece in range(0, WIDE_M, PART_M):
        chosen = piece + tl.arange(0, PART_M)
        one = exponents_of(query, query_map, query_bias, head, chosen, inner, SCALE, ROOT, D, DIRECTIONS, HEDGEHOG)
        other = exponents_of(key, key_map, key_bias, kv_head, chosen, inner, SCALE, ROOT, D, DIRECTIONS, HEDGEHOG)
        for half in tl.static_range(0, 2 if HEDGEHOG else 1):
            asked = features_of(one, chosen, largest, divisor, 1 - 2 * half, True, NORMAL, DIRECTIONS, HEDGEHOG)
            features = features_of(other, chosen, held, held_sum, 1 - 2 * half, False, NORMAL, DIRECTIONS, HEDGEHOG)
            found += product(narrowed(asked, query.dtype), tl.trans(narrowed(features, key.dtype)))
    return found


@triton.jit
def load_kinds(pairs, rows, slots, count, there, RING: tl.constexpr):
    """The kinds of pairs of nodes with nodes, or with slots of the ring below 0."""
    inside = (rows < count)[:, None] & there[None, :]
    return tl.load(pairs + rows[:, None] * (RING + count) + RING + slots[None, :], mask=inside, other=0)


@triton.jit
def window_verify_kernel(
    queries,
    keys,
    values,
    ring_keys,
    ring_values,
    memory,
    query_map,
    key_map,
    query_bias,
    key_bias,
    balance,
    pairs,
    clock,
    count,
    outputs,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_M: tl.constexpr,
    PART_M: tl.constexpr,
    PART_E: tl.constexpr,
    PARTS: tl.constexpr,
    RING: tl.constexpr,
    TILE: tl.constexpr,
    NODES: tl.constexpr,
    SCALE: tl.constexpr,
    ROOT: tl.constexpr,
    NORMAL: tl.constexpr,
    HEDGEHOG: tl.constexpr,
    DECAYED: tl.constexpr,
):
    """Outputs `[B, N, H, E]`.

    `memory [B, K, M, E + 1]` has the normaliser behind the values, `pairs [B, N, RING + N]` are 1 for near ones and 2
    for far ones, `clock [B, K, RING + N]` has sums of the logarithms of decay since the memory's last token.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // SHARE
    KV_HEADS: tl.constexpr = HEADS // SHARE
    begin = tile * NODES
    rows = begin + tl.arange(0, NODES)
    there = rows < count
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    query = load_rows(queries, batch, begin, inner, there, count, head, HEADS, D)
    kinds = pairs + batch * count * (RING + count)
    lane = batch * KV_HEADS + kv_head
    times = clock + lane * (RING + count)
    largest, divisor = softmax_of_map(
        query, query_map, query_bias, head, inner, SCALE, ROOT, D, DIRECTIONS, WIDE_M, PART_M, HEDGEHOG
    )

    found = tl.zeros([NODES, PART_E], tl.float32)
    total = tl.zeros([NODES], tl.float32)
    for piece in range(0, WIDE_M, PART_M):
        chosen = piece + tl.arange(0, PART_M)
        exponents = exponents_of(
            query, query_map, query_bias, head, chosen, inner, SCALE, ROOT, D, DIRECTIONS, HEDGEHOG
        )
        for half in tl.static_range(0, 2 if HEDGEHOG else 1):
            asked = features_of(exponents, chosen, largest, divisor, 1 - 2 * half, True, NORMAL, DIRECTIONS, HEDGEHOG)
            asked = narrowed(asked, query.dtype)
            held = half * DIRECTIONS + chosen
            found += memory_product(asked, load_memory(memory, lane, held, columns, M, E + 1))
            sums = memory + lane.to(tl.int64) * (M * (E + 1)) + held * (E + 1) + E
            total += tl.sum(asked.to(tl.float32) * tl.load(sums, mask=held < M, other=0.0)[None, :], axis=1)
    age = tl.zeros([NODES], tl.float32)
    if DECAYED:
        age = tl.load(times + RING + rows, mask=there, other=0.0)
        found *= tl.exp(age)[:, None]
        total *= tl.exp(age)

    for begins in range(-RING, count, TILE):
        slots = begins + tl.arange(0, TILE)
        held = slots < count
        far = load_kinds(kinds, rows, slots, count, held, RING) == FAR
        if tl.max(tl.max(far.to(tl.int32), axis=1), axis=0) > 0:
            key = load_joined(keys, ring_keys, batch, begins, inner, held, count, kv_head, KV_HEADS, D, RING, True)
            scores = feature_products(
                query,
                key,
                largest,
                divisor,
                query_map,
                query_bias,
                key_map,
                key_bias,
                head,
                kv_head,
                inner,
                SCALE,
                ROOT,
                NORMAL,
                D,
                DIRECTIONS,
                WIDE_M,
                PART_M,
                HEDGEHOG,
            )
            if DECAYED:
                other = tl.load(times + RING + slots, mask=held, other=0.0)
                scores *= tl.exp(tl.where(far, age[:, None] - other[None, :], 0.0))
            scores = tl.where(far, scores, 0.0)
            value = load_joined(
                values, ring_values, batch, begins, columns, held, count, kv_head, KV_HEADS, E, RING, True
            )
            total += tl.sum(scores, axis=1)
            found += product(narrowed(scores, value.dtype), value)

    some = total > 0
    safe = tl.where(some, total, 1.0)
    scale = tl.zeros([NODES], tl.float32) + tl.load(balance + head)
    if not HEDGEHOG:
        scale += largest - NORMAL
    found *= (1.0 / safe)[:, None]
    top = tl.where(some, scale + tl.log(safe), LOWEST)
    weight = tl.where(some, 1.0, 0.0)
    for begins in range(-RING, count, TILE):
        slots = begins + tl.arange(0, TILE)
        held = slots < count
        near = load_kinds(kinds, rows, slots, count, held, RING) == NEAR
        key = load_joined(keys, ring_keys, batch, begins, inner, held, count, kv_head, KV_HEADS, D, RING, True)
        value = load_joined(values, ring_values, batch, begins, columns, held, count, kv_head, KV_HEADS, E, RING, True)
        scores = tl.where(near, SCALE * product(query, tl.trans(key)), LOWEST)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(near, tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(top - higher)
        weight = weight * shrink + tl.sum(weights, axis=1)
        found = found * shrink[:, None] + product(narrowed(weights, value.dtype), value)
        top = higher
    safe = tl.where(weight > 0, weight, 1.0)
    store_rows(outputs, found / safe[:, None], batch, begin, columns, there, count, head, HEADS, E)
