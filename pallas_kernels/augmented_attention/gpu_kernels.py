"""Triton kernels of augmented linear attention: outputs, and gradients of queries and of keys and values.

A program has a tile of rows of one head and a part of the values' columns; every program of a block reads the memory
before it. Upper-case arguments are compile-time constants; docstrings name what is read and written.
"""

import triton
import triton.language as tl

from pallas_kernels.gpu_parts import (
    load_joined,
    load_memory,
    load_rows,
    memory_product,
    narrowed,
    product,
    scaled,
    store_rows,
    unit_gradient,
    unit_scale,
)


@triton.jit
def placed(places, batch, rows, length, BEFORE: tl.constexpr, PLACED: tl.constexpr):
    """Documents (0: nothing there), positions, and whether the memory holds the token already."""
    if PLACED:
        inside = (rows < length) & (rows >= -BEFORE)
        whole = length + BEFORE
        base = places + batch * 3 * whole + rows + BEFORE
        document = tl.load(base, mask=inside, other=0)
        position = tl.load(base + whole, mask=inside, other=0)
        known = tl.load(base + 2 * whole, mask=inside, other=0)
    else:
        document = ((rows >= 0) & (rows < length)).to(tl.int32)
        position = rows
        known = tl.zeros_like(rows)
    return document, position, known


@triton.jit
def pairs(document, position, other_document, other_position, known, GROUP: tl.constexpr):
    """Which queries and keys are near each other, in the same group, and in different groups."""
    near = (document[:, None] == other_document[None, :]) & (other_document > 0)[None, :]
    met = near & (known == 0)[None, :]
    group, other_group = position // GROUP, other_position // GROUP
    local = met & (group[:, None] == other_group[None, :]) & (other_position[None, :] <= position[:, None])
    earlier = met & (other_group[None, :] < group[:, None])
    return near, local, earlier


@triton.jit
def pair_weights(
    scores,
    near,
    local,
    earlier,
    factor,
    taps,
    head,
    asked,
    rows,
    LOCAL: tl.constexpr,
    GROUPED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Weights of all branches together."""
    weights = tl.zeros_like(scores)
    if LOCAL:
        positive = tl.maximum(scores, 0.0)
        weights += tl.where(local, positive * positive, 0.0)
    if GROUPED:
        weights += tl.where(earlier, factor * scores, 0.0)
    if WIDTH > 0:
        lag = asked[:, None] - rows[None, :]
        inside = near & (lag >= 0) & (lag < WIDTH)
        weights += tl.load(taps + head * WIDTH + lag, mask=inside, other=0.0)
    return weights


@triton.jit
def score_gradient(scores, upstream, local, earlier, factor, LOCAL: tl.constexpr, GROUPED: tl.constexpr):
    """Gradient of the scores, given that of the weights."""
    gradient = tl.zeros_like(scores)
    if LOCAL:
        gradient += tl.where(local, 2.0 * tl.maximum(scores, 0.0) * upstream, 0.0)
    if GROUPED:
        gradient += tl.where(earlier, factor * upstream, 0.0)
    return gradient


@triton.jit
def scored_keys(
    keys,
    first_keys,
    batch,
    begin,
    columns,
    there,
    length,
    head,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BEFORE: tl.constexpr,
    UNIT: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Keys as they are scored, as they came, and the scale between; those before the row have been scaled before."""
    rows = begin + tl.arange(0, there.shape[0])
    raw = load_rows(keys, batch, begin, columns, there & (rows >= 0) & (rows < length), length, head, KV_HEADS, D)
    scale = unit_scale(raw, UNIT)
    ready = scaled(raw, scale, UNIT)
    if STARTED:
        early = there & (rows < 0) & (rows >= -BEFORE)
        ready += load_rows(first_keys, batch, begin + BEFORE, columns, early, BEFORE, head, KV_HEADS, D)
    return ready, raw, scale


@triton.jit
def outputs_kernel(
    queries,
    keys,
    values,
    first_keys,
    first_values,
    memories,
    alpha,
    taps,
    places,
    carried,
    length,
    blocks,
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
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    LOCAL: tl.constexpr,
    GROUPED: tl.constexpr,
    UNIT: tl.constexpr,
    PLACED: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Outputs `[B, T, H, E]`, from memories `[B, n, K, D, E]`, places `[B, 3, P + T]` and carried `[B, n + 1]`."""
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // SHARE
    KV_HEADS: tl.constexpr = HEADS // SHARE
    begin = tile * TILE
    block = begin // BLOCK
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    asked = begin + tl.arange(0, TILE)
    document, position, known = placed(places, batch, asked, length, BEFORE, PLACED)
    raw = load_rows(queries, batch, begin, inner, document > 0, length, head, HEADS, D)
    scale = unit_scale(raw, UNIT)
    query = scaled(raw, scale, UNIT)
    factor = 0.0
    if GROUPED:
        factor = tl.load(alpha + head)

    found = tl.zeros([TILE, PART_E], tl.float32)
    lowest = block * BLOCK - BEFORE
    if not STARTED:
        lowest = tl.maximum(lowest, 0)
    for key_begin in range(lowest, begin + TILE, TILE):
        rows = key_begin + tl.arange(0, TILE)
        other_document, other_position, known = placed(places, batch, rows, length, BEFORE, PLACED)
        there = other_document > 0
        key, raw_key, key_scale = scored_keys(
            keys, first_keys, batch, key_begin, inner, there, length, kv_head, KV_HEADS, D, BEFORE, UNIT, STARTED
        )
        value = load_joined(
            values, first_values, batch, key_begin, columns, there, length, kv_head, KV_HEADS, E, BEFORE, STARTED
        )
        near, local, earlier = pairs(document, position, other_document, other_position, known, GROUP)
        scores = product(query, tl.trans(key))
        weights = pair_weights(scores, near, local, earlier, factor, taps, head, asked, rows, LOCAL, GROUPED, WIDTH)
        found += product(narrowed(weights, value.dtype), value)

    if GROUPED:
        index = (batch * blocks + block) * KV_HEADS + kv_head
        reads = document > 0
        if PLACED:
            reads = reads & (document == tl.load(carried + batch * (blocks + 1) + block))
        read = tl.zeros([TILE, PART_E], tl.float32)
        for piece in range(0, WIDE_D, PART_D):
            chosen = piece + tl.arange(0, PART_D)
            some = load_rows(queries, batch, begin, chosen, reads, length, head, HEADS, D)
            memory = load_memory(memories, index, chosen, columns, D, E)
            read += memory_product(scaled(some, scale, UNIT), memory)
        found += factor * read
    store_rows(outputs, found, batch, begin, columns, asked < length, length, head, HEADS, E)


@triton.jit
def query_gradients_kernel(
    queries,
    keys,
    values,
    first_keys,
    first_values,
    memories,
    cotangents,
    alpha,
    taps,
    places,
    carried,
    length,
    blocks,
    query_gradients,
    alpha_gradients,
    taps_gradients,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE_D: tl.constexpr,
    PART_E: tl.constexpr,
    PIECE_E: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE_WIDTH: tl.constexpr,
    LOCAL: tl.constexpr,
    GROUPED: tl.constexpr,
    UNIT: tl.constexpr,
    PLACED: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Gradients of queries `[parts, B, T, H, D]`, alpha `[parts, B, tiles, H]` and taps `[parts, B, tiles, H, W]`.

    Each part is what a part of the values' columns adds: all of them are linear in the gradient of the pairs' weights.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // SHARE
    KV_HEADS: tl.constexpr = HEADS // SHARE
    batches, tiles = tl.num_programs(2), tl.num_programs(0) // PARTS
    begin = tile * TILE
    block = begin // BLOCK
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    asked = begin + tl.arange(0, TILE)
    document, position, known = placed(places, batch, asked, length, BEFORE, PLACED)
    raw = load_rows(queries, batch, begin, inner, document > 0, length, head, HEADS, D)
    scale = unit_scale(raw, UNIT)
    query = scaled(raw, scale, UNIT)
    cotangent = load_rows(cotangents, batch, begin, columns, document > 0, length, head, HEADS, E)
    factor = 0.0
    if GROUPED:
        factor = tl.load(alpha + head)

    found = tl.zeros([TILE, WIDE_D], tl.float32)
    change = tl.zeros([TILE], tl.float32)
    filtered = tl.zeros([WIDE_WIDTH], tl.float32)
    lags = tl.arange(0, WIDE_WIDTH)
    lowest = block * BLOCK - BEFORE
    if not STARTED:
        lowest = tl.maximum(lowest, 0)
    for key_begin in range(lowest, begin + TILE, TILE):
        rows = key_begin + tl.arange(0, TILE)
        other_document, other_position, known = placed(places, batch, rows, length, BEFORE, PLACED)
        there = other_document > 0
        key, raw_key, key_scale = scored_keys(
            keys, first_keys, batch, key_begin, inner, there, length, kv_head, KV_HEADS, D, BEFORE, UNIT, STARTED
        )
        value = load_joined(
            values, first_values, batch, key_begin, columns, there, length, kv_head, KV_HEADS, E, BEFORE, STARTED
        )
        near, local, earlier = pairs(document, position, other_document, other_position, known, GROUP)
        scores = product(query, tl.trans(key))
        upstream = product(cotangent, tl.trans(value))
        slope = score_gradient(scores, upstream, local, earlier, factor, LOCAL, GROUPED)
        found += product(narrowed(slope, key.dtype), key)
        if GROUPED:
            change += tl.sum(tl.where(earlier, scores * upstream, 0.0), axis=1)
        if WIDTH > 0:
            if begin - key_begin < WIDTH + TILE:
                # Sums along diagonals: every row is shifted until lags stand below each other.
                column = (asked - key_begin)[:, None] - lags[None, :]
                inside = (column >= 0) & (column < TILE) & (lags < WIDTH)[None, :]
                shifted = tl.gather(tl.where(near, upstream, 0.0), tl.where(inside, column, 0), 1)
                filtered += tl.sum(tl.where(inside, shifted, 0.0), axis=0)

    if GROUPED:
        index = (batch * blocks + block) * KV_HEADS + kv_head
        reads = document > 0
        if PLACED:
            reads = reads & (document == tl.load(carried + batch * (blocks + 1) + block))
        read = tl.zeros([TILE, WIDE_D], tl.float32)
        for piece in range(0, PART_E, PIECE_E):
            chosen = part * PART_E + piece + tl.arange(0, PIECE_E)
            some = load_rows(cotangents, batch, begin, chosen, reads, length, head, HEADS, E)
            read += memory_product(some, tl.trans(load_memory(memories, index, inner, chosen, D, E)))
        found += factor * read
        change += tl.sum(read * query.to(tl.float32), axis=1)
    found = unit_gradient(raw, scale, found, UNIT)
    store_rows(query_gradients, found, part * batches + batch, begin, inner, asked < length, length, head, HEADS, D)
    place = ((part * batches + batch) * tiles + tile) * HEADS + head
    tl.store(alpha_gradients + place, tl.sum(change, axis=0))
    if WIDTH > 0:
        tl.store(taps_gradients + place * WIDTH + lags, filtered, mask=lags < WIDTH)


@triton.jit
def key_gradients_kernel(
    queries,
    keys,
    values,
    first_keys,
    first_values,
    memory_gradients,
    cotangents,
    alpha,
    taps,
    places,
    folded,
    length,
    blocks,
    key_gradients,
    value_gradients,
    first_key_gradients,
    first_value_gradients,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE_D: tl.constexpr,
    PART_D: tl.constexpr,
    PART_E: tl.constexpr,
    PIECE_E: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    LOCAL: tl.constexpr,
    GROUPED: tl.constexpr,
    UNIT: tl.constexpr,
    PLACED: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Gradients of keys `[parts, B, T, K, D]` and values `[B, T, K, E]`, and of those before the row (`[.., P, ..]`).

    `memory_gradients [B, n, K, D, E]` are of the memory after each block, `folded [B, P + T]` says which rows join it.
    """
    part = tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    KV_HEADS: tl.constexpr = HEADS // SHARE
    batches = tl.num_programs(2)
    begin = (tl.program_id(0) // PARTS) * TILE
    if STARTED:
        begin -= BEFORE
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    rows = begin + tl.arange(0, TILE)
    document, position, known = placed(places, batch, rows, length, BEFORE, PLACED)
    there = document > 0
    key, raw, scale = scored_keys(
        keys, first_keys, batch, begin, inner, there, length, head, KV_HEADS, D, BEFORE, UNIT, STARTED
    )
    value = load_joined(values, first_values, batch, begin, columns, there, length, head, KV_HEADS, E, BEFORE, STARTED)
    # The rows join the memory after this block, of which they are the window's last ones that are asked.
    last = (begin + BEFORE) // BLOCK

    key_found = tl.zeros([TILE, WIDE_D], tl.float32)
    value_found = tl.zeros([TILE, PART_E], tl.float32)
    for share in range(0, SHARE):
        own = head * SHARE + share
        factor = 0.0
        if GROUPED:
            factor = tl.load(alpha + own)
        for query_begin in range(tl.maximum(begin, 0), tl.minimum((last + 1) * BLOCK, length), TILE):
            asked = query_begin + tl.arange(0, TILE)
            own_document, own_position, own_known = placed(places, batch, asked, length, BEFORE, PLACED)
            query = load_rows(queries, batch, query_begin, inner, own_document > 0, length, own, HEADS, D)
            query = scaled(query, unit_scale(query, UNIT), UNIT)
            cotangent = load_rows(cotangents, batch, query_begin, columns, own_document > 0, length, own, HEADS, E)
            near, local, earlier = pairs(own_document, own_position, document, position, known, GROUP)
            scores = product(query, tl.trans(key))
            weights = pair_weights(scores, near, local, earlier, factor, taps, own, asked, rows, LOCAL, GROUPED, WIDTH)
            value_found += product(tl.trans(narrowed(weights, cotangent.dtype)), cotangent)
            upstream = product(cotangent, tl.trans(value))
            slope = score_gradient(scores, upstream, local, earlier, factor, LOCAL, GROUPED)
            key_found += product(tl.trans(narrowed(slope, query.dtype)), query)

    if GROUPED:
        index = (batch * blocks + tl.minimum(last, blocks - 1)) * KV_HEADS + head
        joins = there
        if PLACED:
            joins = tl.load(folded + batch * (length + BEFORE) + rows + BEFORE, mask=rows < length, other=0.0) != 0
        for piece in range(0, PART_E, PIECE_E):
            chosen = part * PART_E + piece + tl.arange(0, PIECE_E)
            some = load_joined(
                values, first_values, batch, begin, chosen, joins, length, head, KV_HEADS, E, BEFORE, STARTED
            )
            key_found += memory_product(some, tl.trans(load_memory(memory_gradients, index, inner, chosen, D, E)))
        for piece in range(0, WIDE_D, PART_D):
            chosen = piece + tl.arange(0, PART_D)
            some = load_rows(keys, batch, begin, chosen, joins & (rows >= 0), length, head, KV_HEADS, D)
            some = scaled(some, scale, UNIT)
            if STARTED:
                early = joins & (rows < 0)
                some += load_rows(first_keys, batch, begin + BEFORE, chosen, early, BEFORE, head, KV_HEADS, D)
            value_found += memory_product(some, load_memory(memory_gradients, index, chosen, columns, D, E))

    outer = part * batches + batch
    own_rows = (rows >= 0) & (rows < length)
    if STARTED:
        early = rows < 0
        store_rows(first_key_gradients, key_found, outer, begin + BEFORE, inner, early, BEFORE, head, KV_HEADS, D)
        store_rows(first_value_gradients, value_found, batch, begin + BEFORE, columns, early, BEFORE, head, KV_HEADS, E)
    key_found = unit_gradient(raw, scale, key_found, UNIT)
    store_rows(key_gradients, key_found, outer, begin, inner, own_rows, length, head, KV_HEADS, D)
    store_rows(value_gradients, value_found, batch, begin, columns, own_rows, length, head, KV_HEADS, E)
