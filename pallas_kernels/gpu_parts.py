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
def load_rows(pointer, batch, begin, columns, there, length, head, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """`[n, columns]` of a head's n rows from a first one on, zero where they or a column are not there."""
    # One wide number for a tile, narrow ones within it: registers are few.
    base = pointer + ((batch * length + begin).to(tl.int64) * HEADS + head) * SIZE
    offset = tl.arange(0, there.shape[0])[:, None] * (HEADS * SIZE) + columns[None, :]
    return tl.load(base + offset, mask=there[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, found, batch, begin, columns, there, length, head, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Writes what `load_rows` reads."""
    base = pointer + ((batch * length + begin).to(tl.int64) * HEADS + head) * SIZE
    offset = tl.arange(0, there.shape[0])[:, None] * (HEADS * SIZE) + columns[None, :]
    mask = there[:, None] & (columns < SIZE)[None, :]
    tl.store(base + offset, narrowed(found, pointer.dtype.element_ty), mask=mask)


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
    """`[n]` what rows are multiplied by to have length one, zero for zero rows; or ones."""
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
    """Writes what `load_memory` reads."""
    pointer += index.to(tl.int64) * (D * E)
    offset = rows[:, None] * E + columns[None, :]
    tl.store(pointer + offset, found, mask=(rows < D)[:, None] & (columns < E)[None, :])


@triton.jit
def memories_kernel(
    left,
    right,
    first_left,
    first_right,
    factors,
    weights,
    keep,
    initial,
    extras,
    initial_sum,
    length,
    blocks,
    before,
    after,
    before_sum,
    after_sum,
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
    REVERSE: tl.constexpr,
):
    """Memories `sum weight left right^T` before every block of rows, and after the last; or in reverse order.

    `before [B, n, K, D, E]` and `after [B, K, D, E]` are float32, as is `initial`. The rows of a block are shifted by
    BEFORE, and the last block's go on to the end. `weights [B, BEFORE + T]` (AGED: `[B, K, BEFORE + T]`) are of the
    rows, `keep [B, n]` (AGED: `[B, K, n]`) of the memory, `factors [H]` of the query heads that share a memory.
    SUMMED: likewise a sum from `initial_sum` on, `before_sum [B, n, K, D]` and `after_sum [B, K, D]`, to which ADDED
    adds `sum weight extras left`, with `extras [B, T, H]` or ones.
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = HEADS // SHARE
    inner, columns = tl.arange(0, WIDE_D), part * PART_E + tl.arange(0, PART_E)
    memory = load_memory(initial, batch * kv_heads + head, inner, columns, D, E)
    lane = batch * kv_heads + head if AGED else batch
    total = tl.zeros([WIDE_D], tl.float32)
    if SUMMED:
        total = tl.load(initial_sum + (batch * kv_heads + head) * D + inner, mask=inner < D, other=0.0)
    for step in range(0, blocks):
        block = blocks - 1 - step if REVERSE else step
        index = (batch * blocks + block) * kv_heads + head
        store_memory(before, memory, index, inner, columns, D, E)
        if SUMMED:
            if part == 0:
                tl.store(before_sum + index * D + inner, total, mask=inner < D)
        if WEIGHTS:
            kept = tl.load(keep + lane * blocks + block)
            memory *= kept
            total *= kept
        begin = block * BLOCK - BEFORE
        end = begin + BLOCK
        if block == blocks - 1:
            end += BEFORE
        for tile in range(begin, end, TILE):
            rows = tile + tl.arange(0, TILE)
            there = (rows < length) & (rows >= -BEFORE)
            weight = tl.full([TILE], 1.0, tl.float32)
            if WEIGHTS:
                weight = tl.load(weights + lane * (length + BEFORE) + rows + BEFORE, mask=there, other=0.0)
                there = there & (weight != 0)
            for share in tl.static_range(SHARE):
                own = head * SHARE + share
                # Rows of `first_left` have been scaled before.
                one = load_rows(left, batch, tile, inner, there & (rows >= 0), length, own, HEADS, D)
                one = scaled(one, unit_scale(one, UNIT), UNIT)
                if STARTED:
                    early = there & (rows < 0)
                    one += load_rows(first_left, batch, tile + BEFORE, inner, early, BEFORE, own, HEADS, D)
                other = load_joined(
                    right, first_right, batch, tile, columns, there, length, own, HEADS, E, BEFORE, STARTED
                )
                if AGED:
                    added = split_product(tl.trans(one.to(tl.float32) * weight[:, None]), other)
                else:
                    added = product(tl.trans(one), other)
                if FACTORS:
                    added *= tl.load(factors + own)
                memory += added
                if ADDED:
                    extra = weight
                    if EXTRAS:
                        place = (batch * length + rows) * HEADS + own
                        extra *= tl.load(extras + place, mask=there & (rows >= 0), other=0.0)
                    total += tl.sum(one.to(tl.float32) * extra[:, None], axis=0)
    index = batch * kv_heads + head
    store_memory(after, memory, index, inner, columns, D, E)
    if SUMMED:
        if part == 0:
            tl.store(after_sum + index * D + inner, total, mask=inner < D)
