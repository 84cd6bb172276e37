"""Attention over a window and a memory, for one block and one head: plain functions of small arrays.

    weights = e^{scale q·k - top} near + e^{log_scale + balance - top} phi(q)·phi(k) decay far
    outputs = (weights values + read phi(q) S) / (the same sums of ones)

with S the memory before the block's window and `top` so large that no weight is above one. The memory lies with its
features in the last axis: `sum v phi(k)^T` `[E, M]`, beside the sum of keys' features `[1, M]`. Sums are float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.precision import upcast
from pallas_kernels.products import matmul, memory_matmul, zero_absent
from pallas_kernels.tpu.heads import SUBLANES, flat, upright
from pallas_kernels.windowed_attention.problem import AttentionWindowPlan, WindowedPlan
from pallas_kernels.windows.clock import SplitSums, lag, parts_of
from pallas_kernels.windows.features import LARGEST_EXPONENT

LOWEST = float(jnp.finfo(jnp.float32).min)


class BlockPairs(NamedTuple):
    """Masks of the rows and pairs of a block and its window.

    Attributes:
        near: `[C, W]` pairs whose key is in the query's window.
        far: `[C, W]` pairs whose key is before it.
        keys: `[W, 1]` window rows that are there.
        keys_flat: `[1, W]` likewise.
        queries: `[C, 1]` block rows that are there.
        folded: `[W, 1]` window rows that join the memory after the block.
        folded_flat: `[1, W]` likewise.
        reads: `[C, 1]` queries of the document that the memory is of.
        keep: whether the memory survives the block: no other document has begun.
    """

    near: Bool[Array, "C W"]
    far: Bool[Array, "C W"]
    keys: Bool[Array, "W 1"]
    keys_flat: Bool[Array, "1 W"]
    queries: Bool[Array, "C 1"]
    folded: Bool[Array, "W 1"]
    folded_flat: Bool[Array, "1 W"]
    reads: Bool[Array, "C 1"]
    keep: Bool[Array, ""]


def block_pairs_in_row(block: Int[Array, ""], plan: WindowedPlan) -> BlockPairs:
    """Masks of a block of a row that is one document from its beginning."""
    begin = block * plan.block
    query, key = begin + _count(plan.block, 0), begin - plan.before + _count(plan.width, 1)
    upright_key = begin - plan.before + _count(plan.width, 0)
    there, held = ((each >= 0) & (each < plan.length) for each in (key, upright_key))
    counts, joins = (each >= plan.window.sinks for each in (key, upright_key))
    start = plan.window.start(query)
    return BlockPairs(
        near=there & counts & (key <= query) & (key >= start),
        far=there & counts & (key < start),
        keys=held,
        keys_flat=there,
        queries=query < plan.length,
        folded=held & joins & (_count(plan.width, 0) < plan.block),
        folded_flat=there & counts & (_count(plan.width, 1) < plan.block),
        reads=query < plan.length,
        keep=jnp.bool_(True),
    )


def block_pairs_by_segment(
    block: Int[Array, ""],
    window: Int[Array, "parts W"],
    carried: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]],
    finished: Int[Array, ""],
    plan: WindowedPlan,
) -> BlockPairs:
    """Masks of a block of a packed row.

    Args:
        block: number of the block.
        window: `[2 or more, W]` segment ids and positions.
        carried: segment ids of the memory's document before the block, after it and after the row.
        finished: tokens of the row's last document before the window of the query after it.
        plan: the plan.
    """
    index = block * plan.block - plan.before + _count(plan.width, 1)
    window = jnp.where(index < plan.length, window, 0)
    columns = window.T
    segment, position = window[:1], window[1:2]
    own, where = columns[:, :1], columns[:, 1:2]
    asked, asked_at = own[plan.before :], where[plan.before :]
    start = plan.window.start(asked_at)
    both = (asked == segment) & (segment > 0) & (position <= asked_at) & (position >= plan.window.sinks)

    def folded(segment: Array, position: Array, axis: int) -> Array:
        leaves = (_count(plan.width, axis) < plan.block) | (block == plan.blocks - 1)
        complete = ((segment != carried[2]) | (position < finished)) & (position >= plan.window.sinks)
        return (segment > 0) & (segment == carried[1]) & leaves & complete

    return BlockPairs(
        near=both & (position >= start),
        far=both & (position < start),
        keys=own > 0,
        keys_flat=segment > 0,
        queries=asked > 0,
        folded=folded(own, where, 0),
        folded_flat=folded(segment, position, 1),
        reads=(asked > 0) & (asked == carried[0]),
        keep=carried[0] == carried[1],
    )


def _count(length: int, axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (length, 1) if axis == 0 else (1, length), axis)


class MappedRows(NamedTuple):
    """Features of rows.

    Attributes:
        exponents: `[n, M]`.
        wide: `[n, M]` features, float32.
        rounded: `[n, M]` features in the rows' type, as all sums take them.
        log_scale: `[n, 1]` logarithm of what they must be multiplied by, zero for keys.
    """

    exponents: Float[Array, "n M"]
    wide: Float[Array, "n M"]
    rounded: Float[Array, "n M"]
    log_scale: Float[Array, "n 1"]


def mapped(
    rows: Float[Array, "n D"],
    weight: Float[Array, "D M"],
    bias: Float[Array, "1 M"] | None,
    plan: WindowedPlan,
    *,
    queries: bool,
) -> MappedRows:
    """The feature map's value for rows of one head: Hedgehog's softmax, or exponentials (Choromanski et al. 2021)."""
    exponents = memory_matmul(rows, weight, (1, 0))
    return features_of(exponents if bias is None else exponents + bias, rows, plan.window, queries=queries)


def features_of(
    exponents: Float[Array, "n M"], rows: Float[Array, "n D"], window: AttentionWindowPlan, *, queries: bool
) -> MappedRows:
    """Features of rows, given their exponents but for what `exponential` takes off for a row's length."""
    scale = jnp.zeros((rows.shape[0], 1), exponents.dtype)
    if window.features == "exponential":
        wide = upcast(rows)
        exponents -= window.scale / 2 * jnp.sum(wide * wide, axis=1, keepdims=True)
    normal = math.log(exponents.shape[1]) / 2
    if window.features == "hedgehog":
        raised = jnp.exp(exponents - jnp.max(exponents, axis=1, keepdims=True))
        found = raised / jnp.sum(raised, axis=1, keepdims=True)
    elif queries:
        largest = jnp.max(exponents, axis=1, keepdims=True)
        found, scale = jnp.exp(exponents - largest), largest - normal
    else:
        found = jnp.exp(jnp.minimum(exponents, LARGEST_EXPONENT) - normal)
    return MappedRows(exponents, found, found.astype(rows.dtype), scale)


class MapGradients(NamedTuple):
    """Gradients of rows `[n, D]`, and of a map's weight `[D, M]` and bias `[1, M]`."""

    rows: Array
    weight: Array
    bias: Array


def mapped_gradients(
    rows: Float[Array, "n D"],
    found: MappedRows,
    weight: Float[Array, "D M"],
    upstream: Float[Array, "n M"],
    plan: WindowedPlan,
    *,
    queries: bool,
) -> MapGradients:
    """Gradients of what features come from, given those of the features."""
    slope = found.wide * upstream
    if plan.window.features == "hedgehog":
        slope -= found.wide * jnp.sum(slope, axis=1, keepdims=True)
    elif not queries:
        slope = jnp.where(found.exponents < LARGEST_EXPONENT, slope, 0)
    own = memory_matmul(slope.astype(rows.dtype), weight, (1, 1))
    if plan.window.features == "exponential":
        own -= plan.window.scale * upcast(rows) * jnp.sum(slope, axis=1, keepdims=True)
    return MapGradients(own, memory_matmul(rows, slope, (0, 0)), jnp.sum(slope, axis=0, keepdims=True))


class DecayClock(NamedTuple):
    """Sums of the logarithms of decay from the window's beginning to each row, itself included, in two parts.

    Attributes:
        queries: `[C, 1]` of the block's rows.
        keys: `[1, W]`.
    """

    queries: SplitSums
    keys: SplitSums


def clock_of(decays: Float[Array, "1 W"] | None, plan: WindowedPlan) -> DecayClock | None:
    """The clock of a window whose absent rows have zeros."""
    if decays is None:
        return None
    sums = _running_parts(decays, plan, lambda row, column: row <= column)
    return DecayClock(SplitSums(*(upright(each)[plan.before :] for each in sums)), sums)


def clock_gradient(queries: Float[Array, "C 1"], keys: Float[Array, "1 W"], plan: WindowedPlan) -> Float[Array, "1 W"]:
    """The gradient of the decays, given that of the clock."""
    late = jnp.concatenate([jnp.zeros((1, plan.before), keys.dtype), flat(queries)], axis=1)
    return _running(keys + late, plan, lambda row, column: row >= column)


def _running(
    row: Float[Array, "1 W"], plan: WindowedPlan, counts: Callable[[Array, Array], Array]
) -> Float[Array, "1 W"]:
    """Sums of a row's numbers at the places that count for each column: a product with a matrix of ones."""
    ones = counts(_count(plan.width, 0), _count(plan.width, 1)).astype(row.dtype)
    return matmul(jnp.broadcast_to(row, (SUBLANES, plan.width)), ones, (1, 0))[:1]


def _running_parts(row: Float[Array, "1 W"], plan: WindowedPlan, counts: Callable[[Array, Array], Array]) -> SplitSums:
    """The same of logarithms of decay, taken apart: one product for both parts."""
    ones = counts(_count(plan.width, 0), _count(plan.width, 1)).astype(row.dtype)
    parts = parts_of(row)
    rows = jnp.where(_count(SUBLANES, 0) == 0, parts.coarse, parts.fine)
    found = matmul(rows, ones, (1, 0))
    return SplitSums(found[:1], found[1:2])


class WeighedPairs(Protocol):
    """Masks that weights are computed by, as `BlockPairs` has them."""

    @property
    def near(self) -> Bool[Array, "C W"]:
        """Pairs whose key is in the query's window."""

    @property
    def far(self) -> Bool[Array, "C W"]:
        """Pairs whose key is before it."""

    @property
    def reads(self) -> Bool[Array, "#C 1"]:
        """Queries of the document that the memory is of."""


class BlockWeights(NamedTuple):
    """Weights of one query head, not yet divided.

    Attributes:
        near: `[C, W]` of near pairs.
        far: `[C, W]` of far ones.
        ratio: `[C, W]` what features' products are multiplied by to be the latter.
        read: `[C, 1]` what is read from the memory is multiplied by.
        divisor: `[C, 1]` the sum of all weights, one where there are none.
        top: `[C, 1]` logarithm of what all of them were divided by.
    """

    near: Float[Array, "C W"]
    far: Float[Array, "C W"]
    ratio: Float[Array, "C W"]
    read: Float[Array, "C 1"]
    divisor: Float[Array, "C 1"]
    top: Float[Array, "C 1"]

    @property
    def totals(self) -> Float[Array, "1 C"]:
        """Logarithms of the sums of weights."""
        return flat(self.top + jnp.log(self.divisor))


def block_weights(
    queries: Float[Array, "C D"],
    keys: Float[Array, "W D"],
    asked: MappedRows,
    features: Float[Array, "W M"],
    normaliser: Float[Array, "1 M"],
    balance: Array,
    clock: DecayClock | None,
    masks: WeighedPairs,
    plan: WindowedPlan,
) -> BlockWeights:
    """Weights of a block for one query head."""
    scores = plan.window.scale * matmul(queries, keys, (1, 1))
    ratio = jnp.ones_like(scores)
    age = jnp.ones_like(asked.log_scale)
    if clock is not None:
        # Masked before the exponential: pairs that do not count would overflow.
        ratio = jnp.exp(jnp.where(masks.far, lag(clock.queries, clock.keys), 0))
        age = jnp.exp(clock.queries.total)
    ratio = jnp.where(masks.far, ratio, 0)
    age = jnp.where(masks.reads, age, 0)
    far = ratio * matmul(asked.rounded, features, (1, 1))
    held = age * jnp.sum(upcast(asked.rounded) * normaliser, axis=1, keepdims=True)
    total = jnp.sum(far, axis=1, keepdims=True) + held
    some = total > 0
    scale = asked.log_scale + balance
    largest = jnp.max(jnp.where(masks.near, scores, LOWEST), axis=1, keepdims=True)
    seen = jnp.where(some, scale + jnp.log(jnp.where(some, total, 1)), LOWEST)
    top = jnp.maximum(jnp.maximum(largest, seen), LOWEST / 2)
    near = jnp.where(masks.near, jnp.exp(jnp.where(masks.near, scores - top, 0)), 0)
    factor = jnp.exp(jnp.where(some, scale - top, 0))
    divisor = jnp.sum(near, axis=1, keepdims=True) + factor * total
    return BlockWeights(near, factor * far, factor * ratio, factor * age, jnp.where(divisor == 0, 1, divisor), top)


def block_outputs(
    weights: BlockWeights, asked: MappedRows, values: Float[Array, "W E"], memory: Float[Array, "E M"]
) -> Float[Array, "C E"]:
    """Outputs of a block for one query head."""
    sums = matmul((weights.near + weights.far).astype(values.dtype), values, (1, 0))
    return (sums + weights.read * memory_matmul(asked.rounded, memory, (1, 1))) / weights.divisor


class HeadGradients(NamedTuple):
    """Gradients of one query head, to be added up.

    Attributes:
        queries: `[C, D]`, without what comes by their features.
        query_features: `[C, M]`.
        keys: `[W, D]`, likewise.
        key_features: `[W, M]`.
        values: `[W, E]`.
        memory: `[E, M]` of the memory before the block.
        normaliser: `[1, M]`.
        clock_queries: `[C, 1]`; their sum is the gradient of the balance.
        clock_keys: `[1, W]`.
    """

    queries: Array
    query_features: Array
    keys: Array
    key_features: Array
    values: Array
    memory: Array
    normaliser: Array
    clock_queries: Array
    clock_keys: Array


def head_gradients(
    cotangents: Float[Array, "C E"],
    queries: Float[Array, "C D"],
    keys: Float[Array, "W D"],
    values: Float[Array, "W E"],
    asked: MappedRows,
    features: Float[Array, "W M"],
    memory: Float[Array, "E M"],
    normaliser: Float[Array, "1 M"],
    weights: BlockWeights,
    totals: Float[Array, "C 1"] | None,
    plan: WindowedPlan,
) -> HeadGradients:
    """Gradients of what a query head met, given those of its outputs, which need not be known, and of `totals`."""
    share = (weights.near + weights.far) / weights.divisor
    read = weights.read / weights.divisor
    upstream = matmul(cotangents, values, (1, 1))
    held = memory_matmul(cotangents, memory, (1, 0))
    wide = upcast(asked.rounded)
    held_sum = jnp.sum(wide * held, axis=1, keepdims=True)
    mean = jnp.sum(share * upstream, axis=1, keepdims=True) + read * held_sum
    if totals is not None:
        mean -= totals
    upstream = (upstream - mean) / weights.divisor
    slope = plan.window.scale * weights.near * upstream
    far = weights.far * upstream
    ratio = weights.ratio * upstream
    total = jnp.sum(wide * normaliser, axis=1, keepdims=True)
    return HeadGradients(
        queries=matmul(slope.astype(keys.dtype), keys, (1, 0)),
        query_features=matmul(ratio.astype(features.dtype), features, (1, 0)) + read * (held - mean * normaliser),
        keys=matmul(slope.astype(queries.dtype), queries, (0, 0)),
        key_features=matmul(ratio.astype(queries.dtype), asked.rounded, (0, 0)),
        values=matmul(share.astype(cotangents.dtype), cotangents, (0, 0)),
        memory=memory_matmul(cotangents, read * wide, (0, 0)),
        normaliser=-jnp.sum(read * mean * wide, axis=0, keepdims=True),
        clock_queries=jnp.sum(far, axis=1, keepdims=True) + read * (held_sum - mean * total),
        clock_keys=-jnp.sum(far, axis=0, keepdims=True),
    )


class Ages(NamedTuple):
    """Decay of what joins the memory, up to the last row that does.

    Attributes:
        rows: `[W, 1]` factors of the window's rows.
        memory: `[1, 1]` factor of what the memory held.
    """

    rows: Float[Array, "W 1"]
    memory: Float[Array, "1 1"]


def ages_of(decays: Float[Array, "1 W"] | None, masks: BlockPairs, plan: WindowedPlan) -> Ages | None:
    """The ages at the end of a block; None without decay."""
    if decays is None:
        return None
    counted = jnp.where(masks.folded_flat, decays, 0)
    later = _running_parts(counted, plan, lambda row, column: row > column)
    return Ages(jnp.exp(upright(later.total)), jnp.exp(jnp.sum(counted, axis=1, keepdims=True)))


def joined(
    features: Float[Array, "W M"],
    values: Float[Array, "W E"],
    memory: Float[Array, "E M"],
    normaliser: Float[Array, "1 M"],
    ages: Ages | None,
    masks: BlockPairs,
) -> tuple[Float[Array, "E M"], Float[Array, "1 M"]]:
    """The memory and the normaliser after the block."""
    joins = zero_absent(features, masks.folded)
    wide = upcast(joins)
    if ages is None:
        added = matmul(values, joins, (0, 0))
    else:
        wide = wide * ages.rows
        added = memory_matmul(values, wide, (0, 0))
        memory, normaliser = ages.memory * memory, ages.memory * normaliser
    return (
        jnp.where(masks.keep, memory, 0) + added,
        jnp.where(masks.keep, normaliser, 0) + jnp.sum(wide, axis=0, keepdims=True),
    )


class JoinedGradients(NamedTuple):
    """Gradients of what joined the memory: features, values, decays, and the memory before.

    Attributes:
        features: `[W, M]`.
        values: `[W, E]`.
        decays: `[1, W]`, None without decay.
        memory: `[E, M]`.
        normaliser: `[1, M]`.
    """

    features: Array
    values: Array
    decays: Array | None
    memory: Array
    normaliser: Array


def joined_gradients(
    features: Float[Array, "W M"],
    values: Float[Array, "W E"],
    before: tuple[Float[Array, "E M"], Float[Array, "1 M"]],
    after: tuple[Float[Array, "E M"], Float[Array, "1 M"]],
    ages: Ages | None,
    masks: BlockPairs,
    plan: WindowedPlan,
) -> JoinedGradients:
    """Gradients, given those of the memory and the normaliser after the block."""
    joins = zero_absent(features, masks.folded)
    upstream = jnp.where(masks.folded, memory_matmul(values, after[0], (1, 0)) + after[1], 0)
    value_gradient, decays = memory_matmul(joins, after[0], (1, 1)), None
    memory, normaliser = (jnp.where(masks.keep, each, 0) for each in after)
    if ages is not None:
        upstream, value_gradient = ages.rows * upstream, ages.rows * value_gradient
        memory, normaliser = ages.memory * memory, ages.memory * normaliser
        kept = jnp.sum(memory * before[0]) + jnp.sum(normaliser * before[1])
        later = flat(jnp.sum(upcast(joins) * upstream, axis=1, keepdims=True))
        decays = jnp.where(masks.folded_flat, _running(later, plan, lambda row, column: row < column) + kept, 0)
    return JoinedGradients(upstream, value_gradient, decays, memory, normaliser)
