"""Triton kernels of attention over a window and a memory: outputs, and gradients of rows and of their features.

A program has a tile of rows of one head; every program of a block reads the memory before the block's window. Keys of
the window count as near or far, pair by pair; far ones by products of features `[B, T, heads, M]`. Upper-case arguments
are compile-time constants (TOKENS 0: a window of groups); docstrings name what is read and written.
"""

import triton
import triton.language as tl

from pallas_kernels.augmented_attention.gpu_kernels import load_segments
from pallas_kernels.gpu.blocks import (
    load_joined,
    load_memory,
    load_rows,
    memory_product,
    narrowed,
    product,
    store_rows,
)

LOWEST = tl.constexpr(-1e30)
# Exponents are capped where what they belong to is nothing.
LARGEST = tl.constexpr(80.0)


@triton.jit
def load_numbers(numbers, lane, rows, length):
    """Loads a number for each row, from `[lanes, T]`, zero where there is none."""
    return tl.load(numbers + lane * length + rows, mask=(rows >= 0) & (rows < length), other=0.0)


@triton.jit
def load_clock(clock, lane, rows, block, length, BLOCK: tl.constexpr, BEFORE: tl.constexpr):
    """Sums of the logarithms of decay from the beginning of a block's window to each row, itself included.

    `clock [B K, 2, P + T]` begins anew with every BLOCK rows, of which a window has the first, and some more. Coarse
    and fine parts are returned apart: differences are to be taken of each.
    """
    whole = length + BEFORE
    coarse = clock + 2 * lane * whole + BEFORE
    fine = coarse + whole
    inside = (rows < length) & (rows >= -BEFORE)
    end = (block + 1) * BLOCK - BEFORE
    last = tl.minimum(end, length) - 1
    late = rows >= end
    found = tl.load(coarse + rows, mask=inside, other=0.0) + tl.where(late, tl.load(coarse + last), 0.0)
    rest = tl.load(fine + rows, mask=inside, other=0.0) + tl.where(late, tl.load(fine + last), 0.0)
    return found, rest


@triton.jit
def near_far(
    segment,
    position,
    other_segment,
    other_position,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Masks `[queries, keys]` of pairs whose key is in the query's window, and of those whose key is before it.

    Keys at the SINKS first positions are in neither.
    """
    both = (segment[:, None] == other_segment[None, :]) & (other_segment > 0)[None, :]
    both = both & (other_position[None, :] <= position[:, None])
    if SINKS > 0:
        both = both & (other_position >= SINKS)[None, :]
    if TOKENS > 0:
        start = position - TOKENS + 1
    else:
        start = (position // GROUP - GROUPS) * GROUP
    inside = other_position[None, :] >= start[:, None]
    return both & inside, both & (other_position[None, :] < start[:, None])


@triton.jit
def first_near(begin, GROUP: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, PLACED: tl.constexpr):
    """The first row of keys that queries from `begin` on may have in their windows."""
    first = begin - (GROUPS + 1) * GROUP + 1
    if not PLACED:
        first = (begin // GROUP - GROUPS) * GROUP
    if TOKENS > 0:
        first = begin - TOKENS + 1
    return first


@triton.jit
def end_far(last, GROUP: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, PLACED: tl.constexpr):
    """The end of the rows of keys that may lie before the windows of queries up to `last`."""
    end = last - GROUPS * GROUP
    if not PLACED:
        end = (last // GROUP - GROUPS) * GROUP
    if TOKENS > 0:
        end = last - TOKENS + 1
    return end


@triton.jit
def end_near(last, GROUP: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, PLACED: tl.constexpr):
    """The end of the rows of queries that may have keys up to `last` in their windows."""
    end = last + (GROUPS + 1) * GROUP
    if not PLACED:
        end = (last // GROUP + GROUPS + 1) * GROUP
    if TOKENS > 0:
        end = last + TOKENS
    return end


@triton.jit
def first_far(begin, GROUP: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, PLACED: tl.constexpr):
    """The first row of queries before whose windows keys from `begin` on may lie."""
    first = begin + GROUPS * GROUP + 1
    if not PLACED:
        first = (begin // GROUP + GROUPS + 1) * GROUP
    if TOKENS > 0:
        first = begin + TOKENS
    return first


@triton.jit
def feature_scores(
    asked,
    held,
    first_held,
    batch,
    query_begin,
    key_begin,
    query_there,
    key_there,
    length,
    head,
    kv_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    M: tl.constexpr,
    WIDE_M: tl.constexpr,
    PART_M: tl.constexpr,
    BEFORE: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Products of features `[queries, keys]`."""
    found = tl.zeros([query_there.shape[0], key_there.shape[0]], tl.float32)
    for piece in range(0, WIDE_M, PART_M):
        chosen = piece + tl.arange(0, PART_M)
        one = load_rows(asked, batch, query_begin, chosen, query_there, length, head, HEADS, M)
        other = load_joined(
            held, first_held, batch, key_begin, chosen, key_there, length, kv_head, KV_HEADS, M, BEFORE, STARTED
        )
        found += product(one, tl.trans(other))
    return found


@triton.jit
def decay_ratio(
    far, clock, lane, asked, rows, block, length, BLOCK: tl.constexpr, BEFORE: tl.constexpr, DECAYED: tl.constexpr
):
    """Decay `[queries, keys]` of far pairs, zero for others; one without DECAYED."""
    if DECAYED:
        own, own_rest = load_clock(clock, lane, asked, block, length, BLOCK, BEFORE)
        other, other_rest = load_clock(clock, lane, rows, block, length, BLOCK, BEFORE)
        lag = (own[:, None] - other[None, :]) + (own_rest[:, None] - other_rest[None, :])
        found = tl.where(far, tl.exp(tl.where(far, lag, 0.0)), 0.0)
    else:
        found = tl.where(far, 1.0, 0.0)
    return found


@triton.jit
def outputs_kernel(
    queries,
    keys,
    values,
    first_keys,
    first_values,
    asked_features,
    features,
    first_features,
    scales,
    clock,
    places,
    carried,
    memories,
    normalisers,
    length,
    blocks,
    outputs,
    totals,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_M: tl.constexpr,
    PART_M: tl.constexpr,
    PART_E: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    DECAYED: tl.constexpr,
    PLACED: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Outputs `[B, T, H, E]`, and logarithms of the sums of weights `[B, H, T]`.

    From memories `[B, n, K, M, E]` and `[B, n, K, M]`, factors' logarithms `scales [B, H, T]`, places `[B, 3, P + T]`
    and carried `[B, n + 1]`. Far sums come first, as one term of the softmax over near pairs.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // SHARE
    KV_HEADS: tl.constexpr = HEADS // SHARE
    lane = batch * KV_HEADS + kv_head
    begin = tile * TILE
    block = begin // BLOCK
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    asked = begin + tl.arange(0, TILE)
    segment, position, known = load_segments(places, batch, asked, length, BEFORE, PLACED)
    lowest = block * BLOCK - BEFORE
    if not STARTED:
        lowest = tl.maximum(lowest, 0)

    found = tl.zeros([TILE, PART_E], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    index = (batch * blocks + block) * KV_HEADS + kv_head
    reads = segment > 0
    if PLACED:
        reads = reads & (segment == tl.load(carried + batch * (blocks + 1) + block))
    for piece in range(0, WIDE_M, PART_M):
        chosen = piece + tl.arange(0, PART_M)
        some = load_rows(asked_features, batch, begin, chosen, reads, length, head, HEADS, M)
        found += memory_product(some, load_memory(memories, index, chosen, columns, M, E))
        held = tl.load(normalisers + index * M + chosen, mask=chosen < M, other=0.0)
        total += tl.sum(some.to(tl.float32) * held[None, :], axis=1)
    if DECAYED:
        coarse, fine = load_clock(clock, lane, asked, block, length, BLOCK, BEFORE)
        age = tl.exp(coarse + fine)
        found *= age[:, None]
        total *= age
    for key_begin in range(lowest, end_far(begin + TILE - 1, GROUP, GROUPS, TOKENS, PLACED), TILE):
        rows = key_begin + tl.arange(0, TILE)
        other_segment, other_position, known = load_segments(places, batch, rows, length, BEFORE, PLACED)
        there = other_segment > 0
        near, far = near_far(segment, position, other_segment, other_position, GROUP, GROUPS, TOKENS, SINKS)
        scores = feature_scores(
            asked_features,
            features,
            first_features,
            batch,
            begin,
            key_begin,
            segment > 0,
            there,
            length,
            head,
            kv_head,
            HEADS,
            KV_HEADS,
            M,
            WIDE_M,
            PART_M,
            BEFORE,
            STARTED,
        )
        scores *= decay_ratio(far, clock, lane, asked, rows, block, length, BLOCK, BEFORE, DECAYED)
        value = load_joined(
            values, first_values, batch, key_begin, columns, there, length, kv_head, KV_HEADS, E, BEFORE, STARTED
        )
        total += tl.sum(scores, axis=1)
        found += product(narrowed(scores, value.dtype), value)

    some = total > 0
    safe = tl.where(some, total, 1.0)
    scale = load_numbers(scales, batch * HEADS + head, asked, length)
    largest = tl.where(some, scale + tl.log(safe), LOWEST)
    found *= (1.0 / safe)[:, None]
    divisor = tl.where(some, 1.0, 0.0)
    query = load_rows(queries, batch, begin, inner, segment > 0, length, head, HEADS, D)
    near_begin = first_near(begin, GROUP, GROUPS, TOKENS, PLACED)
    for key_begin in range(lowest + tl.maximum(near_begin - lowest, 0) // TILE * TILE, begin + TILE, TILE):
        rows = key_begin + tl.arange(0, TILE)
        other_segment, other_position, known = load_segments(places, batch, rows, length, BEFORE, PLACED)
        there = other_segment > 0
        key = load_joined(
            keys, first_keys, batch, key_begin, inner, there, length, kv_head, KV_HEADS, D, BEFORE, STARTED
        )
        value = load_joined(
            values, first_values, batch, key_begin, columns, there, length, kv_head, KV_HEADS, E, BEFORE, STARTED
        )
        near, far = near_far(segment, position, other_segment, other_position, GROUP, GROUPS, TOKENS, SINKS)
        scores = tl.where(near, SCALE * product(query, tl.trans(key)), LOWEST)
        top = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.where(near, tl.exp(scores - top[:, None]), 0.0)
        shrink = tl.exp(largest - top)
        divisor = divisor * shrink + tl.sum(weights, axis=1)
        found = found * shrink[:, None] + product(narrowed(weights, value.dtype), value)
        largest = top
    safe = tl.where(divisor > 0, divisor, 1.0)
    store_rows(outputs, found / safe[:, None], batch, begin, columns, asked < length, length, head, HEADS, E)
    if part == 0:
        found_total = tl.where(divisor > 0, largest + tl.log(safe), 0.0)
        tl.store(totals + (batch * HEADS + head) * length + asked, found_total, mask=asked < length)


@triton.jit
def query_gradients_kernel(
    queries,
    keys,
    values,
    first_keys,
    first_values,
    asked_features,
    features,
    first_features,
    scales,
    clock,
    places,
    carried,
    memories,
    normalisers,
    cotangents,
    totals,
    means,
    length,
    blocks,
    query_gradients,
    feature_gradients,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_E: tl.constexpr,
    PART_M: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    DECAYED: tl.constexpr,
    PLACED: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Gradients of queries `[B, T, H, D]`, without what comes by features, and of these `[B, T, H, M]`, float32.

    Program after program a part of the features, and the last one queries. `totals` are the logarithms of the sums of
    weights, `means` the products of outputs and their gradients, both `[B, H, T]`.
    """
    tile, part = tl.program_id(0) // (PARTS + 1), tl.program_id(0) % (PARTS + 1)
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // SHARE
    KV_HEADS: tl.constexpr = HEADS // SHARE
    lane, own_lane = batch * KV_HEADS + kv_head, batch * HEADS + head
    begin = tile * TILE
    block = begin // BLOCK
    outer = tl.arange(0, WIDE_E)
    asked = begin + tl.arange(0, TILE)
    segment, position, known = load_segments(places, batch, asked, length, BEFORE, PLACED)
    lowest = block * BLOCK - BEFORE
    if not STARTED:
        lowest = tl.maximum(lowest, 0)
    cotangent = load_rows(cotangents, batch, begin, outer, segment > 0, length, head, HEADS, E)
    total = load_numbers(totals, own_lane, asked, length)
    mean = load_numbers(means, own_lane, asked, length)

    if part == PARTS:
        inner = tl.arange(0, WIDE_D)
        query = load_rows(queries, batch, begin, inner, segment > 0, length, head, HEADS, D)
        found = tl.zeros([TILE, WIDE_D], tl.float32)
        near_begin = first_near(begin, GROUP, GROUPS, TOKENS, PLACED)
        for key_begin in range(lowest + tl.maximum(near_begin - lowest, 0) // TILE * TILE, begin + TILE, TILE):
            rows = key_begin + tl.arange(0, TILE)
            other_segment, other_position, known = load_segments(places, batch, rows, length, BEFORE, PLACED)
            there = other_segment > 0
            key = load_joined(
                keys, first_keys, batch, key_begin, inner, there, length, kv_head, KV_HEADS, D, BEFORE, STARTED
            )
            value = load_joined(
                values, first_values, batch, key_begin, outer, there, length, kv_head, KV_HEADS, E, BEFORE, STARTED
            )
            near, far = near_far(segment, position, other_segment, other_position, GROUP, GROUPS, TOKENS, SINKS)
            scores = tl.where(near, SCALE * product(query, tl.trans(key)) - total[:, None], LOWEST)
            slope = tl.exp(scores) * (product(cotangent, tl.trans(value)) - mean[:, None])
            found += product(narrowed(slope, key.dtype), key)
        store_rows(query_gradients, SCALE * found, batch, begin, inner, asked < length, length, head, HEADS, D)
    else:
        chosen = part * PART_M + tl.arange(0, PART_M)
        index = (batch * blocks + block) * KV_HEADS + kv_head
        held = tl.load(normalisers + index * M + chosen, mask=chosen < M, other=0.0)
        moved = memory_product(cotangent, tl.trans(load_memory(memories, index, chosen, outer, M, E)))
        moved -= mean[:, None] * held[None, :]
        reads = segment > 0
        if PLACED:
            reads = reads & (segment == tl.load(carried + batch * (blocks + 1) + block))
        if DECAYED:
            coarse, fine = load_clock(clock, lane, asked, block, length, BLOCK, BEFORE)
            moved *= tl.exp(coarse + fine)[:, None]
        moved = tl.where(reads[:, None], moved, 0.0)
        for key_begin in range(lowest, end_far(begin + TILE - 1, GROUP, GROUPS, TOKENS, PLACED), TILE):
            rows = key_begin + tl.arange(0, TILE)
            other_segment, other_position, known = load_segments(places, batch, rows, length, BEFORE, PLACED)
            there = other_segment > 0
            near, far = near_far(segment, position, other_segment, other_position, GROUP, GROUPS, TOKENS, SINKS)
            value = load_joined(
                values, first_values, batch, key_begin, outer, there, length, kv_head, KV_HEADS, E, BEFORE, STARTED
            )
            slope = product(cotangent, tl.trans(value)) - mean[:, None]
            slope *= decay_ratio(far, clock, lane, asked, rows, block, length, BLOCK, BEFORE, DECAYED)
            other = load_joined(
                features, first_features, batch, key_begin, chosen, there, length, kv_head, KV_HEADS, M, BEFORE, STARTED
            )
            moved += product(narrowed(slope, other.dtype), other)
        scale = load_numbers(scales, own_lane, asked, length) - total
        moved *= tl.exp(tl.minimum(scale, LARGEST))[:, None]
        store_rows(feature_gradients, moved, batch, begin, chosen, asked < length, length, head, HEADS, M)


@triton.jit
def key_gradients_kernel(
    queries,
    keys,
    values,
    first_keys,
    first_values,
    asked_features,
    features,
    first_features,
    scales,
    clock,
    places,
    folds,
    memory_gradients,
    normaliser_gradients,
    cotangents,
    totals,
    means,
    length,
    blocks,
    key_gradients,
    value_gradients,
    feature_gradients,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_E: tl.constexpr,
    WIDE_M: tl.constexpr,
    PART_M: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    DECAYED: tl.constexpr,
    PLACED: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Gradients of keys `[B, P + T, K, D]`, values and keys' features, of the rows before the row too; float32.

    Program after program a part of the features, and the last one keys and values. `memory_gradients [B, n, K, M, E]`
    and `[B, n, K, M]` are of the memory after each block, `folds [B K, P + T]` is how much of a row joins it.
    """
    part = tl.program_id(0) % (PARTS + 1)
    head, batch = tl.program_id(1), tl.program_id(2)
    KV_HEADS: tl.constexpr = HEADS // SHARE
    lane = batch * KV_HEADS + head
    begin = (tl.program_id(0) // (PARTS + 1)) * TILE
    if STARTED:
        begin -= BEFORE
    whole = length + BEFORE
    rows = begin + tl.arange(0, TILE)
    outer = tl.arange(0, WIDE_E)
    segment, position, known = load_segments(places, batch, rows, length, BEFORE, PLACED)
    there = segment > 0
    value = load_joined(values, first_values, batch, begin, outer, there, length, head, KV_HEADS, E, BEFORE, STARTED)
    last = (begin + BEFORE) // BLOCK
    end = tl.minimum((last + 1) * BLOCK, length)
    index = (batch * blocks + tl.minimum(last, blocks - 1)) * KV_HEADS + head
    joins = tl.load(folds + lane * whole + rows + BEFORE, mask=rows < length, other=0.0)
    lowest = tl.maximum(begin, 0)
    far_begin = tl.maximum(first_far(begin, GROUP, GROUPS, TOKENS, PLACED), 0)
    far_begin = lowest + tl.maximum(far_begin - lowest, 0) // TILE * TILE

    if part == PARTS:
        inner = tl.arange(0, WIDE_D)
        key = load_joined(keys, first_keys, batch, begin, inner, there, length, head, KV_HEADS, D, BEFORE, STARTED)
        key_found = tl.zeros([TILE, WIDE_D], tl.float32)
        value_found = tl.zeros([TILE, WIDE_E], tl.float32)
        for piece in range(0, WIDE_M, PART_M):
            chosen = piece + tl.arange(0, PART_M)
            some = load_joined(
                features, first_features, batch, begin, chosen, there, length, head, KV_HEADS, M, BEFORE, STARTED
            )
            value_found += memory_product(some, load_memory(memory_gradients, index, chosen, outer, M, E))
        value_found *= joins[:, None]
        near_end = tl.minimum(end_near(begin + TILE - 1, GROUP, GROUPS, TOKENS, PLACED), end)
        for share in range(0, SHARE):
            own = head * SHARE + share
            own_lane = batch * HEADS + own
            for query_begin in range(lowest, near_end, TILE):
                asked = query_begin + tl.arange(0, TILE)
                own_segment, own_position, known = load_segments(places, batch, asked, length, BEFORE, PLACED)
                query = load_rows(queries, batch, query_begin, inner, own_segment > 0, length, own, HEADS, D)
                cotangent = load_rows(cotangents, batch, query_begin, outer, own_segment > 0, length, own, HEADS, E)
                total = load_numbers(totals, own_lane, asked, length)
                mean = load_numbers(means, own_lane, asked, length)
                near, far = near_far(own_segment, own_position, segment, position, GROUP, GROUPS, TOKENS, SINKS)
                scores = tl.where(near, SCALE * product(query, tl.trans(key)) - total[:, None], LOWEST)
                weights = tl.exp(scores)
                slope = weights * (product(cotangent, tl.trans(value)) - mean[:, None])
                value_found += product(tl.trans(narrowed(weights, cotangent.dtype)), cotangent)
                key_found += product(tl.trans(narrowed(slope, query.dtype)), query)
            for query_begin in range(far_begin, end, TILE):
                asked = query_begin + tl.arange(0, TILE)
                own_segment, own_position, known = load_segments(places, batch, asked, length, BEFORE, PLACED)
                cotangent = load_rows(cotangents, batch, query_begin, outer, own_segment > 0, length, own, HEADS, E)
                near, far = near_far(own_segment, own_position, segment, position, GROUP, GROUPS, TOKENS, SINKS)
                weights = feature_scores(
                    asked_features,
                    features,
                    first_features,
                    batch,
                    query_begin,
                    begin,
                    own_segment > 0,
                    there,
                    length,
                    own,
                    head,
                    HEADS,
                    KV_HEADS,
                    M,
                    WIDE_M,
                    PART_M,
                    BEFORE,
                    STARTED,
                )
                block = query_begin // BLOCK
                weights *= decay_ratio(far, clock, lane, asked, rows, block, length, BLOCK, BEFORE, DECAYED)
                scale = load_numbers(scales, own_lane, asked, length) - load_numbers(totals, own_lane, asked, length)
                weights *= tl.exp(tl.minimum(scale, LARGEST))[:, None]
                value_found += product(tl.trans(narrowed(weights, cotangent.dtype)), cotangent)
        own_rows = rows < length
        early = begin + BEFORE
        store_rows(key_gradients, SCALE * key_found, batch, early, inner, own_rows, whole, head, KV_HEADS, D)
        store_rows(value_gradients, value_found, batch, early, outer, own_rows, whole, head, KV_HEADS, E)
    else:
        chosen = part * PART_M + tl.arange(0, PART_M)
        held = tl.load(normaliser_gradients + index * M + chosen, mask=chosen < M, other=0.0)
        found = memory_product(value, tl.trans(load_memory(memory_gradients, index, chosen, outer, M, E)))
        found = (found + held[None, :]) * joins[:, None]
        for share in range(0, SHARE):
            own = head * SHARE + share
            own_lane = batch * HEADS + own
            for query_begin in range(far_begin, end, TILE):
                asked = query_begin + tl.arange(0, TILE)
                own_segment, own_position, known = load_segments(places, batch, asked, length, BEFORE, PLACED)
                cotangent = load_rows(cotangents, batch, query_begin, outer, own_segment > 0, length, own, HEADS, E)
                near, far = near_far(own_segment, own_position, segment, position, GROUP, GROUPS, TOKENS, SINKS)
                slope = product(cotangent, tl.trans(value))
                slope -= load_numbers(means, own_lane, asked, length)[:, None]
                block = query_begin // BLOCK
                slope *= decay_ratio(far, clock, lane, asked, rows, block, length, BLOCK, BEFORE, DECAYED)
                scale = load_numbers(scales, own_lane, asked, length) - load_numbers(totals, own_lane, asked, length)
                slope *= tl.exp(tl.minimum(scale, LARGEST))[:, None]
                other = load_rows(asked_features, batch, query_begin, chosen, own_segment > 0, length, own, HEADS, M)
                found += product(tl.trans(narrowed(slope, other.dtype)), other)
        store_rows(feature_gradients, found, batch, begin + BEFORE, chosen, rows < length, whole, head, KV_HEADS, M)
