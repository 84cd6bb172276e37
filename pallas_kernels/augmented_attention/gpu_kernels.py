"""Triton kernels of augmented linear attention: outputs, and gradients of queries and of keys and values.

A program has a tile of rows of one head and a part of the values' columns; every program of a block reads the memory
before it. Rows are multiplied as they came, so that they go straight from memory to the tensor cores, and products are
scaled. Tiles that are far from each other meet in the grouped branch alone: their pairs are linear in scores, need no
mask in whole rows, and are summed up with what the memory holds. Upper-case arguments are compile-time constants;
docstrings name what is read and written.
"""

import triton
import triton.language as tl

from pallas_kernels.gpu.blocks import (
    load_joined,
    load_memory,
    load_rows,
    load_scales,
    memory_product,
    narrowed,
    product,
    store_rows,
    unit_gradient,
)


@triton.jit
def load_segments(places, batch, rows, length, BEFORE: tl.constexpr, PLACED: tl.constexpr):
    """Segment ids (0: padding), positions, and whether the memory holds the token already."""
    if PLACED:
        inside = (rows < length) & (rows >= -BEFORE)
        whole = length + BEFORE
        base = places + batch * 3 * whole + rows + BEFORE
        segment = tl.load(base, mask=inside, other=0)
        position = tl.load(base + whole, mask=inside, other=0)
        known = tl.load(base + 2 * whole, mask=inside, other=0)
    else:
        segment = ((rows >= 0) & (rows < length)).to(tl.int32)
        position = rows
        known = tl.zeros_like(rows)
    return segment, position, known


@triton.jit
def near_keys(begin, lowest, GROUP: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PLACED: tl.constexpr):
    """The first tile of keys that queries of a tile may meet in their group or in the convolution."""
    first = begin - GROUP + 1
    if not PLACED:
        first = begin // GROUP * GROUP
    if WIDTH > 0:
        first = tl.minimum(first, begin - WIDTH + 1)
    return lowest + tl.maximum(first - lowest, 0) // TILE * TILE


@triton.jit
def near_queries(begin, GROUP: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PLACED: tl.constexpr):
    """The first tile of queries that are far from a tile of keys, which may begin below 0."""
    last = begin + TILE - 1
    end = last + GROUP
    if not PLACED:
        end = (last // GROUP + 1) * GROUP
    if WIDTH > 0:
        end = tl.maximum(end, last + WIDTH)
    return begin + (end - begin + TILE - 1) // TILE * TILE


@triton.jit
def met(segment, other_segment, known):
    """Mask of pairs of one document whose key is not in the memory yet."""
    return (segment == other_segment) & (other_segment > 0) & (known == 0)


@triton.jit
def pairs(segment, position, other_segment, other_position, known, GROUP: tl.constexpr, PLACED: tl.constexpr):
    """Masks of pairs of one document, of pairs in the same group, and of pairs in different groups.

    In whole rows, those that are not there are zero and need no mask.
    """
    group, other_group = position // GROUP, other_position // GROUP
    local = (group == other_group) & (other_position <= position)
    earlier = other_group < group
    near = position == position
    if PLACED:
        near = (segment == other_segment) & (other_segment > 0)
        both = near & (known == 0)
        local = local & both
        earlier = earlier & both
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
    lag,
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
def window_keys(
    keys,
    first_keys,
    scales,
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
    """Keys as they came, and their scales; those before the row have been scaled before."""
    rows = begin + tl.arange(0, there.shape[0])
    key = load_joined(keys, first_keys, batch, begin, columns, there, length, head, KV_HEADS, D, BEFORE, STARTED)
    return key, load_scales(scales, batch, rows, length, head, KV_HEADS, UNIT)


@triton.jit
def window_tile(
    sources,
    row,
    begin,
    inner,
    columns,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    PLACED: tl.constexpr,
    STARTED: tl.constexpr,
):
    """A tile of a window's rows: segment ids, positions, what the memory holds already, keys, their scales, values."""
    keys, values, first_keys, first_values, scales, places = sources
    batch, length, head = row
    segment, position, known = load_segments(places, batch, begin + tl.arange(0, TILE), length, BEFORE, PLACED)
    there = segment > 0
    key, scale = window_keys(
        keys, first_keys, scales, batch, begin, inner, there, length, head, KV_HEADS, D, BEFORE, UNIT, STARTED
    )
    value = load_joined(values, first_values, batch, begin, columns, there, length, head, KV_HEADS, E, BEFORE, STARTED)
    return segment, position, known, key, scale, value


@triton.jit
def outputs_kernel(
    queries,
    keys,
    values,
    first_keys,
    first_values,
    query_scales,
    key_scales,
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
    segment, position, known = load_segments(places, batch, asked, length, BEFORE, PLACED)
    query = load_rows(queries, batch, begin, inner, segment > 0, length, head, HEADS, D)
    scale = load_scales(query_scales, batch, asked, length, head, HEADS, UNIT)

    found = tl.zeros([TILE, PART_E], tl.float32)
    lowest = block * BLOCK - BEFORE
    if not STARTED:
        lowest = tl.maximum(lowest, 0)
    near_begin = near_keys(begin, lowest, GROUP, TILE, WIDTH, PLACED)
    sources, row = (keys, values, first_keys, first_values, key_scales, places), (batch, length, kv_head)
    factor = 0.0
    if GROUPED:
        factor = tl.load(alpha + head)
        index = (batch * blocks + block) * KV_HEADS + kv_head
        reads = segment > 0
        if PLACED:
            reads = reads & (segment == tl.load(carried + batch * (blocks + 1) + block))
        for piece in range(0, WIDE_D, PART_D):
            chosen = piece + tl.arange(0, PART_D)
            some = load_rows(queries, batch, begin, chosen, reads, length, head, HEADS, D)
            found += memory_product(some, load_memory(memories, index, chosen, columns, D, E))
        for key_begin in range(lowest, near_begin, TILE):
            other_segment, other_position, known, key, key_scale, value = window_tile(
                sources, row, key_begin, inner, columns, KV_HEADS, D, E, BEFORE, TILE, UNIT, PLACED, STARTED
            )
            scores = product(query, tl.trans(key)) * key_scale[None, :]
            if PLACED:
                scores = tl.where(met(segment[:, None], other_segment[None, :], known[None, :]), scores, 0.0)
            found += product(narrowed(scores, value.dtype), value)
        found *= (factor * scale)[:, None]

    for key_begin in range(near_begin, begin + TILE, TILE):
        rows = key_begin + tl.arange(0, TILE)
        other_segment, other_position, known, key, key_scale, value = window_tile(
            sources, row, key_begin, inner, columns, KV_HEADS, D, E, BEFORE, TILE, UNIT, PLACED, STARTED
        )
        near, local, earlier = pairs(
            segment[:, None],
            position[:, None],
            other_segment[None, :],
            other_position[None, :],
            known[None, :],
            GROUP,
            PLACED,
        )
        scores = product(query, tl.trans(key)) * scale[:, None] * key_scale[None, :]
        lag = asked[:, None] - rows[None, :]
        weights = pair_weights(scores, near, local, earlier, factor, taps, head, lag, LOCAL, GROUPED, WIDTH)
        found += product(narrowed(weights, value.dtype), value)
    store_rows(outputs, found, batch, begin, columns, asked < length, length, head, HEADS, E)


@triton.jit
def query_gradients_kernel(
    queries,
    keys,
    values,
    first_keys,
    first_values,
    query_scales,
    key_scales,
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
    segment, position, known = load_segments(places, batch, asked, length, BEFORE, PLACED)
    query = load_rows(queries, batch, begin, inner, segment > 0, length, head, HEADS, D)
    scale = load_scales(query_scales, batch, asked, length, head, HEADS, UNIT)
    cotangent = load_rows(cotangents, batch, begin, columns, segment > 0, length, head, HEADS, E)

    found = tl.zeros([TILE, WIDE_D], tl.float32)
    change = tl.zeros([TILE], tl.float32)
    filtered = tl.zeros([WIDE_WIDTH], tl.float32)
    lags = tl.arange(0, WIDE_WIDTH)
    lowest = block * BLOCK - BEFORE
    if not STARTED:
        lowest = tl.maximum(lowest, 0)
    near_begin = near_keys(begin, lowest, GROUP, TILE, WIDTH, PLACED)
    sources, row = (keys, values, first_keys, first_values, key_scales, places), (batch, length, kv_head)
    factor = 0.0
    if GROUPED:
        factor = tl.load(alpha + head)
        index = (batch * blocks + block) * KV_HEADS + kv_head
        reads = segment > 0
        if PLACED:
            reads = reads & (segment == tl.load(carried + batch * (blocks + 1) + block))
        for piece in range(0, PART_E, PIECE_E):
            chosen = part * PART_E + piece + tl.arange(0, PIECE_E)
            some = load_rows(cotangents, batch, begin, chosen, reads, length, head, HEADS, E)
            found += memory_product(some, tl.trans(load_memory(memories, index, inner, chosen, D, E)))
        for key_begin in range(lowest, near_begin, TILE):
            other_segment, other_position, known, key, key_scale, value = window_tile(
                sources, row, key_begin, inner, columns, KV_HEADS, D, E, BEFORE, TILE, UNIT, PLACED, STARTED
            )
            upstream = product(cotangent, tl.trans(value)) * key_scale[None, :]
            if PLACED:
                upstream = tl.where(met(segment[:, None], other_segment[None, :], known[None, :]), upstream, 0.0)
            found += product(narrowed(upstream, key.dtype), key)
        # What is linear in scores adds to alpha's gradient its own scores.
        change = tl.sum(found * query.to(tl.float32), axis=1) * scale
        found *= factor

    for key_begin in range(near_begin, begin + TILE, TILE):
        other_segment, other_position, known, key, key_scale, value = window_tile(
            sources, row, key_begin, inner, columns, KV_HEADS, D, E, BEFORE, TILE, UNIT, PLACED, STARTED
        )
        near, local, earlier = pairs(
            segment[:, None],
            position[:, None],
            other_segment[None, :],
            other_position[None, :],
            known[None, :],
            GROUP,
            PLACED,
        )
        scores = product(query, tl.trans(key)) * scale[:, None] * key_scale[None, :]
        upstream = product(cotangent, tl.trans(value))
        slope = score_gradient(scores, upstream, local, earlier, factor, LOCAL, GROUPED)
        found += product(narrowed(slope * key_scale[None, :], key.dtype), key)
        if GROUPED:
            change += tl.sum(tl.where(earlier, scores * upstream, 0.0), axis=1)
        if WIDTH > 0:
            if begin - key_begin < WIDTH + TILE:
                # Sums along diagonals: every row is shifted until lags stand below each other.
                column = (asked - key_begin)[:, None] - lags[None, :]
                inside = (column >= 0) & (column < TILE) & (lags < WIDTH)[None, :]
                shifted = tl.gather(tl.where(near, upstream, 0.0), tl.where(inside, column, 0), 1)
                filtered += tl.sum(tl.where(inside, shifted, 0.0), axis=0)

    found = unit_gradient(query, scale, found, UNIT)
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
    query_scales,
    key_scales,
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
    segment, position, known = load_segments(places, batch, rows, length, BEFORE, PLACED)
    there = segment > 0
    key, scale = window_keys(
        keys, first_keys, key_scales, batch, begin, inner, there, length, head, KV_HEADS, D, BEFORE, UNIT, STARTED
    )
    value = load_joined(values, first_values, batch, begin, columns, there, length, head, KV_HEADS, E, BEFORE, STARTED)
    # The rows join the memory after this block, of which they are the window's last ones that are asked.
    last = (begin + BEFORE) // BLOCK
    end = tl.minimum((last + 1) * BLOCK, length)
    far_begin = tl.maximum(near_queries(begin, GROUP, TILE, WIDTH, PLACED), 0)

    key_found = tl.zeros([TILE, WIDE_D], tl.float32)
    value_found = tl.zeros([TILE, PART_E], tl.float32)
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
            some = load_joined(
                keys, first_keys, batch, begin, chosen, joins, length, head, KV_HEADS, D, BEFORE, STARTED
            )
            value_found += memory_product(some, load_memory(memory_gradients, index, chosen, columns, D, E))
        for share in range(0, SHARE):
            own = head * SHARE + share
            factor = tl.load(alpha + own)
            for query_begin in range(far_begin, end, TILE):
                asked = query_begin + tl.arange(0, TILE)
                own_segment, own_position, own_known = load_segments(places, batch, asked, length, BEFORE, PLACED)
                query = load_rows(queries, batch, query_begin, inner, own_segment > 0, length, own, HEADS, D)
                cotangent = load_rows(cotangents, batch, query_begin, columns, own_segment > 0, length, own, HEADS, E)
                weight = factor * load_scales(query_scales, batch, asked, length, own, HEADS, UNIT)
                scores = product(key, tl.trans(query)) * weight[None, :]
                upstream = product(value, tl.trans(cotangent)) * weight[None, :]
                if PLACED:
                    both = met(own_segment[None, :], segment[:, None], known[:, None])
                    scores = tl.where(both, scores, 0.0)
                    upstream = tl.where(both, upstream, 0.0)
                value_found += product(narrowed(scores, cotangent.dtype), cotangent)
                key_found += product(narrowed(upstream, query.dtype), query)
        value_found *= scale[:, None]

    for share in range(0, SHARE):
        own = head * SHARE + share
        factor = 0.0
        if GROUPED:
            factor = tl.load(alpha + own)
        for query_begin in range(tl.maximum(begin, 0), tl.minimum(far_begin, end), TILE):
            asked = query_begin + tl.arange(0, TILE)
            own_segment, own_position, own_known = load_segments(places, batch, asked, length, BEFORE, PLACED)
            query = load_rows(queries, batch, query_begin, inner, own_segment > 0, length, own, HEADS, D)
            cotangent = load_rows(cotangents, batch, query_begin, columns, own_segment > 0, length, own, HEADS, E)
            query_scale = load_scales(query_scales, batch, asked, length, own, HEADS, UNIT)
            near, local, earlier = pairs(
                own_segment[None, :],
                own_position[None, :],
                segment[:, None],
                position[:, None],
                known[:, None],
                GROUP,
                PLACED,
            )
            scores = product(key, tl.trans(query)) * scale[:, None] * query_scale[None, :]
            lag = asked[None, :] - rows[:, None]
            weights = pair_weights(scores, near, local, earlier, factor, taps, own, lag, LOCAL, GROUPED, WIDTH)
            value_found += product(narrowed(weights, cotangent.dtype), cotangent)
            upstream = product(value, tl.trans(cotangent))
            slope = score_gradient(scores, upstream, local, earlier, factor, LOCAL, GROUPED)
            key_found += product(narrowed(slope * query_scale[None, :], query.dtype), query)

    outer = part * batches + batch
    own_rows = (rows >= 0) & (rows < length)
    if STARTED:
        early = rows < 0
        store_rows(first_key_gradients, key_found, outer, begin + BEFORE, inner, early, BEFORE, head, KV_HEADS, D)
        store_rows(first_value_gradients, value_found, batch, begin + BEFORE, columns, early, BEFORE, head, KV_HEADS, E)
    key_found = unit_gradient(key, scale, key_found, UNIT)
    store_rows(key_gradients, key_found, outer, begin, inner, own_rows, length, head, KV_HEADS, D)
    store_rows(value_gradients, value_found, batch, begin, columns, own_rows, length, head, KV_HEADS, E)
