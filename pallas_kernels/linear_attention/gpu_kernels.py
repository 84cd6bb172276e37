"""Triton kernels of linear attention: outputs, and gradients of queries and of keys and values.

A program has a tile of rows of one head and a part of the values' columns. Upper-case arguments are compile-time
constants; docstrings name what is read and written.
"""

import triton
import triton.language as tl

from pallas_kernels.gpu.blocks import load_memory, load_rows, memory_product, narrowed, product, store_rows


@triton.jit
def load_clock(places, batch, rows, length, PLACED: tl.constexpr):
    """Segment ids (0: padding) and the clock, which counts the tokens that are there."""
    inside = (rows >= 0) & (rows < length)
    if PLACED:
        base = places + batch * 2 * length + rows
        segment = tl.load(base, mask=inside, other=0)
        time = tl.load(base + length, mask=inside, other=0)
    else:
        segment = inside.to(tl.int32)
        time = rows
    return segment, time


@triton.jit
def ages(segment, time, asked, other_segment, other_time, rows, log_decay, DECAY: tl.constexpr):
    """Decay of a pair's weight by its distance; zero where a query and a key do not meet."""
    met = (segment[:, None] == other_segment[None, :]) & (other_segment > 0)[None, :]
    met = met & (rows[None, :] <= asked[:, None])
    if DECAY:
        lag = tl.maximum(time[:, None] - other_time[None, :], 0)
        found = tl.where(met, tl.exp(log_decay * lag.to(tl.float32)), 0.0)
    else:
        found = met.to(tl.float32)
    return found


@triton.jit
def lane_of(pointer, lane, rows, length, there):
    """`[n]` numbers of a head's rows, of an array `[B, K, T]`."""
    return tl.load(pointer + lane * length + rows, mask=there, other=0.0)


@triton.jit
def outputs_kernel(
    queries,
    keys,
    values,
    memories,
    normalisers,
    log_decays,
    reads,
    places,
    length,
    blocks,
    outputs,
    totals,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE_D: tl.constexpr,
    PART_D: tl.constexpr,
    PART_E: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    PLACED: tl.constexpr,
    AGED: tl.constexpr,
    DIVIDED: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """Outputs `[B, T, H, E]` and sums of weights `[B, T, H]`, from the memory before every block.

    `memories [B, n, K, D, E]`, `normalisers [B, n, K, D]`, `log_decays [K]`, `reads [B, K, T]`, `places [B, 2, T]`.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // SHARE
    KV_HEADS: tl.constexpr = HEADS // SHARE
    begin = tile * TILE
    block = begin // BLOCK
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    asked = begin + tl.arange(0, TILE)
    segment, time = load_clock(places, batch, asked, length, PLACED)
    query = load_rows(queries, batch, begin, inner, segment > 0, length, head, HEADS, D)
    log_decay = tl.load(log_decays + kv_head) if DECAY else 0.0

    found = tl.zeros([TILE, PART_E], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for key_begin in range(block * BLOCK, begin + TILE, TILE):
        rows = key_begin + tl.arange(0, TILE)
        other_segment, other_time = load_clock(places, batch, rows, length, PLACED)
        key = load_rows(keys, batch, key_begin, inner, other_segment > 0, length, kv_head, KV_HEADS, D)
        value = load_rows(values, batch, key_begin, columns, other_segment > 0, length, kv_head, KV_HEADS, E)
        weights = product(query, tl.trans(key))
        weights *= ages(segment, time, asked, other_segment, other_time, rows, log_decay, DECAY)
        found += product(narrowed(weights, value.dtype), value)
        total += tl.sum(weights, axis=1)

    index = (batch * blocks + block) * KV_HEADS + kv_head
    age = (segment > 0).to(tl.float32)
    if AGED:
        age = lane_of(reads, batch * KV_HEADS + kv_head, asked, length, segment > 0)
    reading = age != 0
    read = tl.zeros([TILE, PART_E], tl.float32)
    for piece in range(0, WIDE_D, PART_D):
        chosen = piece + tl.arange(0, PART_D)
        some = load_rows(queries, batch, begin, chosen, reading, length, head, HEADS, D)
        read += memory_product(some, load_memory(memories, index, chosen, columns, D, E))
    found += read * age[:, None]
    normaliser = tl.load(normalisers + index * D + inner, mask=inner < D, other=0.0)
    total += age * tl.sum(query.to(tl.float32) * normaliser[None, :], axis=1)
    if DIVIDED:
        if FLOOR > 0:
            divisor = tl.maximum(total, FLOOR)
        else:
            divisor = tl.where(total == 0, 1.0, total)
        found = found / divisor[:, None]
    store_rows(outputs, found, batch, begin, columns, asked < length, length, head, HEADS, E)
    if part == 0:
        tl.store(totals + (batch * length + asked) * HEADS + head, total, mask=asked < length)


@triton.jit
def query_gradients_kernel(
    queries,
    keys,
    values,
    memories,
    normalisers,
    cotangents,
    total_cotangents,
    log_decays,
    reads,
    places,
    length,
    blocks,
    query_gradients,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE_D: tl.constexpr,
    PART_E: tl.constexpr,
    PIECE_E: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    PLACED: tl.constexpr,
    AGED: tl.constexpr,
    DIVIDED: tl.constexpr,
):
    """Gradients of queries `[parts, B, T, H, D]`, from those of sums `[B, T, H, E]` and of sums of weights `[B, T, H]`.

    Each part is what a part of the values' columns adds; the first one adds what sums of weights do.
    """
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // SHARE
    KV_HEADS: tl.constexpr = HEADS // SHARE
    begin = tile * TILE
    block = begin // BLOCK
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    asked = begin + tl.arange(0, TILE)
    segment, time = load_clock(places, batch, asked, length, PLACED)
    cotangent = load_rows(cotangents, batch, begin, columns, segment > 0, length, head, HEADS, E)
    log_decay = tl.load(log_decays + kv_head) if DECAY else 0.0
    total = tl.zeros([TILE], tl.float32)
    if DIVIDED:
        place = (batch * length + asked) * HEADS + head
        total = tl.load(total_cotangents + place, mask=segment > 0, other=0.0) * (part == 0)

    found = tl.zeros([TILE, WIDE_D], tl.float32)
    for key_begin in range(block * BLOCK, begin + TILE, TILE):
        rows = key_begin + tl.arange(0, TILE)
        other_segment, other_time = load_clock(places, batch, rows, length, PLACED)
        key = load_rows(keys, batch, key_begin, inner, other_segment > 0, length, kv_head, KV_HEADS, D)
        value = load_rows(values, batch, key_begin, columns, other_segment > 0, length, kv_head, KV_HEADS, E)
        slope = product(cotangent, tl.trans(value)) + total[:, None]
        slope *= ages(segment, time, asked, other_segment, other_time, rows, log_decay, DECAY)
        found += product(narrowed(slope, key.dtype), key)

    index = (batch * blocks + block) * KV_HEADS + kv_head
    age = (segment > 0).to(tl.float32)
    if AGED:
        age = lane_of(reads, batch * KV_HEADS + kv_head, asked, length, segment > 0)
    normaliser = tl.load(normalisers + index * D + inner, mask=inner < D, other=0.0)
    read = total[:, None] * normaliser[None, :]
    for piece in range(0, PART_E, PIECE_E):
        chosen = part * PART_E + piece + tl.arange(0, PIECE_E)
        some = load_rows(cotangents, batch, begin, chosen, age != 0, length, head, HEADS, E)
        read += memory_product(some, tl.trans(load_memory(memories, index, inner, chosen, D, E)))
    found += read * age[:, None]
    outer = part * tl.num_programs(2) + batch
    store_rows(query_gradients, found, outer, begin, inner, asked < length, length, head, HEADS, D)


@triton.jit
def key_gradients_kernel(
    queries,
    keys,
    values,
    memory_gradients,
    normaliser_gradients,
    cotangents,
    total_cotangents,
    log_decays,
    folds,
    places,
    length,
    blocks,
    key_gradients,
    value_gradients,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE_D: tl.constexpr,
    PART_D: tl.constexpr,
    PART_E: tl.constexpr,
    PIECE_E: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    PLACED: tl.constexpr,
    AGED: tl.constexpr,
    DIVIDED: tl.constexpr,
):
    """Gradients of keys `[parts, B, T, K, D]` and values `[B, T, K, E]`.

    `memory_gradients [B, n, K, D, E]` and `normaliser_gradients [B, n, K, D]` are of the memory after each block,
    `folds [B, K, T]` says with which weights rows join it.
    """
    part = tl.program_id(0) % PARTS
    head, batch = tl.program_id(1), tl.program_id(2)
    KV_HEADS: tl.constexpr = HEADS // SHARE
    begin = (tl.program_id(0) // PARTS) * TILE
    block = begin // BLOCK
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    rows = begin + tl.arange(0, TILE)
    segment, time = load_clock(places, batch, rows, length, PLACED)
    key = load_rows(keys, batch, begin, inner, segment > 0, length, head, KV_HEADS, D)
    value = load_rows(values, batch, begin, columns, segment > 0, length, head, KV_HEADS, E)
    log_decay = tl.load(log_decays + head) if DECAY else 0.0

    key_found = tl.zeros([TILE, WIDE_D], tl.float32)
    value_found = tl.zeros([TILE, PART_E], tl.float32)
    for share in range(0, SHARE):
        own = head * SHARE + share
        for query_begin in range(begin, tl.minimum((block + 1) * BLOCK, length), TILE):
            asked = query_begin + tl.arange(0, TILE)
            own_segment, own_time = load_clock(places, batch, asked, length, PLACED)
            there = own_segment > 0
            query = load_rows(queries, batch, query_begin, inner, there, length, own, HEADS, D)
            cotangent = load_rows(cotangents, batch, query_begin, columns, there, length, own, HEADS, E)
            age = ages(own_segment, own_time, asked, segment, time, rows, log_decay, DECAY)
            weights = product(query, tl.trans(key)) * age
            value_found += product(tl.trans(narrowed(weights, cotangent.dtype)), cotangent)
            slope = product(cotangent, tl.trans(value))
            if DIVIDED:
                place = (batch * length + asked) * HEADS + own
                slope += (tl.load(total_cotangents + place, mask=there, other=0.0) * (part == 0))[:, None]
            key_found += product(tl.trans(narrowed(slope * age, query.dtype)), query)

    index = (batch * blocks + block) * KV_HEADS + head
    joins = (segment > 0).to(tl.float32)
    if AGED:
        joins = lane_of(folds, batch * KV_HEADS + head, rows, length, segment > 0)
    joining = joins != 0
    normaliser = tl.load(normaliser_gradients + index * D + inner, mask=inner < D, other=0.0) * (part == 0)
    joined = tl.zeros([TILE, WIDE_D], tl.float32) + normaliser[None, :]
    for piece in range(0, PART_E, PIECE_E):
        chosen = part * PART_E + piece + tl.arange(0, PIECE_E)
        some = load_rows(values, batch, begin, chosen, joining, length, head, KV_HEADS, E)
        joined += memory_product(some, tl.trans(load_memory(memory_gradients, index, inner, chosen, D, E)))
    key_found += joined * joins[:, None]
    joined = tl.zeros([TILE, PART_E], tl.float32)
    for piece in range(0, WIDE_D, PART_D):
        chosen = piece + tl.arange(0, PART_D)
        some = load_rows(keys, batch, begin, chosen, joining, length, head, KV_HEADS, D)
        joined += memory_product(some, load_memory(memory_gradients, index, chosen, columns, D, E))
    value_found += joined * joins[:, None]

    outer = part * tl.num_programs(2) + batch
    there = rows < length
    store_rows(key_gradients, key_found, outer, begin, inner, there, length, head, KV_HEADS, D)
    store_rows(value_gradients, value_found, batch, begin, columns, there, length, head, KV_HEADS, E)
