"""Triton functions that GPU kernels are made of: rows of a head, products, memories before blocks.

Arrays lie as JAX lays them out, `[B, T, heads, size]` row after row. Upper-case arguments are compile-time constants.
"""

import triton
import triton.language as tl

# Triton's interpreter cuts bfloat16 numbers off instead of rounding them, and multiplies their bits.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrowed(wide, dtype: tl.constexpr):
    """Float32 numbers in another type, rounded to the nearest."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = wide.to(tl.int32, bitcast=True)
            wide = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return wide.to(dtype)


@triton.jit
def row_mask(columns, there, SIZE: tl.constexpr):
    """Mask `[n, columns]` of what exists; with a power of two of columns, all of them do."""
    if (SIZE & (SIZE - 1)) == 0 and columns.shape[0] <= SIZE:
        mask = there[:, None]
    else:
        mask = there[:, None] & (columns < SIZE)[None, :]
    return mask


@triton.jit
def load_rows(pointer, batch, begin, columns, there, length, head, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Loads `[n, columns]` of a head's n rows from a first one on, zero where they or a column do not exist."""
    # One wide number for a tile, narrow ones within it: registers are few.
    base = pointer + ((batch * length + begin).to(tl.int64) * HEADS + head) * SIZE
    offset = tl.arange(0, there.shape[0])[:, None] * (HEADS * SIZE) + columns[None, :]
    return tl.load(base + offset, mask=row_mask(columns, there, SIZE), other=0.0)


@triton.jit
def store_rows(pointer, found, batch, begin, columns, there, length, head, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Stores rows where `load_rows` finds them."""
    base = pointer + ((batch * length + begin).to(tl.int64) * HEADS + head) * SIZE
    offset = tl.arange(0, there.shape[0])[:, None] * (HEADS * SIZE) + columns[None, :]
    tl.store(base + offset, narrowed(found, pointer.dtype.element_ty), mask=row_mask(columns, there, SIZE))


@triton.jit
def load_scales(scales, batch, rows, length, head, HEADS: tl.constexpr, UNIT: tl.constexpr):
    """Factors `[n]` of rows, from `[B, H, T]`; one for those before the row, and without UNIT."""
    scale = tl.full([rows.shape[0]], 1.0, tl.float32)
    if UNIT:
        inside = (rows >= 0) & (rows < length)
        scale = tl.load(scales + (batch * HEADS + head) * length + rows, mask=inside, other=1.0)
    return scale


@triton.jit
def load_joined(
    pointer,
    first,
    batch,
    begin,
    columns,
    there,
    length,
    head,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BEFORE: tl.constexpr,
    STARTED: tl.constexpr,
):
    """`load_rows`, with rows below 0 from `first`, which holds the BEFORE rows before the row."""
    rows = begin + tl.arange(0, there.shape[0])
    own = there & (rows >= 0) & (rows < length)
    found = load_rows(pointer, batch, begin, columns, own, length, head, HEADS, SIZE)
    if STARTED:
        early = there & (rows < 0) & (rows >= -BEFORE)
        found += load_rows(first, batch, begin + BEFORE, columns, early, BEFORE, head, HEADS, SIZE)
    return found


@triton.jit
def unit_scale(rows, UNIT: tl.constexpr):
    """Factors `[n]` that scale rows to length one, zero for zero rows; ones without UNIT."""
    if UNIT:
        wide = rows.to(tl.float32)
        square = tl.sum(wide * wide, axis=1)
        scale = tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    else:
        scale = tl.full([rows.shape[0]], 1.0, tl.float32)
    return scale


@triton.jit
def scaled(rows, scale, UNIT: tl.constexpr):
    """Rows as they are scored, in their type."""
    if UNIT:
        rows = narrowed(rows.to(tl.float32) * scale[:, None], rows.dtype)
    return rows


@triton.jit
def unit_gradient(rows, scale, gradient, UNIT: tl.constexpr):
    """Gradient of rows, given that of their unit vectors."""
    if UNIT:
        direction = rows.to(tl.float32) * scale[:, None]
        along = tl.sum(direction * gradient, axis=1)
        gradient = scale[:, None] * (gradient - direction * along[:, None])
    return gradient


@triton.jit
def product(one, other):
    """A matrix product with float32 sums; float32 factors are not rounded to tensor floats."""
    if INTERPRETED:
        one, other = one.to(tl.float32), other.to(tl.float32)
    return tl.dot(one, other, input_precision="tf32x3")


@triton.jit
def split_product(one, other):
    """A product of a float32 matrix with one of any type; for bfloat16 the first is cut into two parts."""
    if other.dtype == tl.float32:
        found = product(one, other)
    else:
        high = narrowed(one, other.dtype)
        low = narrowed(one - high.to(tl.float32), other.dtype)
        found = product(high, other) + product(low, other)
    return found


@triton.jit
def memory_product(one, other):
    """A product of a matrix of any type with a float32 one; for bfloat16 the second is cut into two parts."""
    if one.dtype == tl.float32:
        found = product(one, other)
    else:
        high = narrowed(other, one.dtype)
        low = narrowed(other - high.to(tl.float32), one.dtype)
        found = product(one, high) + product(one, low)
    return found


@triton.jit
def load_memory(pointer, index, rows, columns, D: tl.constexpr, E: tl.constexpr):
    """Part of the memory `[D, E]` with an index, zero beyond its sizes."""
    pointer += index.to(tl.int64) * (D * E)
    offset = rows[:, None] * E + columns[None, :]
    return tl.load(pointer + offset, mask=(rows < D)[:, None] & (columns < E)[None, :], other=0.0)


@triton.jit
def store_memory(pointer, found, index, rows, columns, D: tl.constexpr, E: tl.constexpr):
    """Stores a part of the memory where `load_memory` finds it."""
    pointer += index.to(tl.int64) * (D * E)
    offset = rows[:, None] * E + columns[None, :]
    tl.store(pointer + offset, found, mask=(rows < D)[:, None] & (columns < E)[None, :])


@triton.jit
def block_sums_kernel(
    left,
    right,
    first_left,
    first_right,
    factors,
    weights,
    scales,
    extras,
    length,
    blocks,
    sums,
    left_sums,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE_D: tl.constexpr,
    PART_E: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    FACTORS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    AGED: tl.constexpr,
    SUMMED: tl.constexpr,
    ADDED: tl.constexpr,
    EXTRAS: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Each block's addition to a memory, `sum weight left right^T`, as float32 `sums [B, n, K, D, E]`.

    The rows of a block are shifted by BEFORE, and the last block's go on to the end. `weights [B, BEFORE + T]` (AGED:
    `[B, K, BEFORE + T]`) and `scales [B, H, T]` (UNIT) are of the rows of `left`, `factors [H]` of the query heads that
    share a memory. SUMMED: likewise `left_sums [B, n, K, D]`, zero or, ADDED, `sum weight extras left`, with
    `extras [B, T, H]` or ones.
    """
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_heads = HEADS // SHARE
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    memory = tl.zeros([WIDE_D, PART_E], tl.float32)
    lane = batch * kv_heads + head if AGED else batch
    total = tl.zeros([WIDE_D], tl.float32)
    begin = block * BLOCK - BEFORE
    end = tl.minimum(begin + BLOCK, length)
    if block == blocks - 1:
        end = length
    if not STARTED:
        begin = tl.maximum(begin, 0)
    for share in range(0, SHARE):
        own = head * SHARE + share
        found = tl.zeros([WIDE_D, PART_E], tl.float32)
        for tile in range(begin, end, TILE):
            rows = tile + tl.arange(0, TILE)
            there = (rows < length) & (rows >= -BEFORE)
            weight = tl.full([TILE], 1.0, tl.float32)
            if WEIGHTS:
                weight = tl.load(weights + lane * (length + BEFORE) + rows + BEFORE, mask=there, other=0.0)
                there = there & (weight != 0)
            one = load_joined(left, first_left, batch, tile, inner, there, length, own, HEADS, D, BEFORE, STARTED)
            other = load_joined(right, first_right, batch, tile, columns, there, length, own, HEADS, E, BEFORE, STARTED)
            if UNIT:
                one = scaled(one, load_scales(scales, batch, rows, length, own, HEADS, UNIT), UNIT)
            if AGED:
                found += split_product(tl.trans(one.to(tl.float32) * weight[:, None]), other)
            else:
                found += product(tl.trans(one), other)
            if ADDED:
                extra = weight
                if EXTRAS:
                    place = (batch * length + rows) * HEADS + own
                    extra *= tl.load(extras + place, mask=there & (rows >= 0), other=0.0)
                total += tl.sum(one.to(tl.float32) * extra[:, None], axis=0)
        if FACTORS:
            found *= tl.load(factors + own)
        memory += found
    index = (batch * blocks + block) * kv_heads + head
    store_memory(sums, memory, index, inner, columns, D, E)
    if SUMMED:
        if part == 0:
            tl.store(left_sums + index * D + inner, total, mask=inner < D)


@triton.jit
def running_sums_kernel(
    sums,
    initial,
    keep,
    blocks,
    before,
    after,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Running sums `before [B, n, K, SIZE]` each block and `after [B, K, SIZE]` the last, from an initial one.

    A program goes through all blocks of some numbers of a memory; `keep [B, n]` (BY_HEAD: `[B, K, n]`) is what each
    block leaves of what was there (WEIGHTS). Nothing is written where something is read.
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = part * PART + tl.arange(0, PART)
    there = place < SIZE
    lane = (batch * HEADS + head).to(tl.int64)
    factors = keep + (lane if BY_HEAD else batch) * blocks
    block, stride = batch * blocks, 1
    if REVERSE:
        block, stride = block + blocks - 1, -1
    total = tl.load(initial + lane * SIZE + place, mask=there, other=0.0)
    index = (block.to(tl.int64) * HEADS + head) * SIZE
    more = tl.load(sums + index + place, mask=there, other=0.0)
    for step in range(0, blocks):
        # The next block's numbers are on their way while these are added.
        following = index + stride * HEADS * SIZE
        ahead = there & (tl.zeros_like(place) + step + 1 < blocks)
        arriving = tl.load(sums + following + place, mask=ahead, other=0.0)
        tl.store(before + index + place, total, mask=there)
        if WEIGHTS:
            total *= tl.load(factors + (blocks - 1 - step if REVERSE else step))
        total += more
        index, more = following, arriving
    tl.store(after + lane * SIZE + place, total, mask=there)
