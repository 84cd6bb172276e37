"""Inputs and results of augmented linear attention, and the plan by which its rows are cut into blocks."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class PackedRows(NamedTuple):
    """Rows that hold several documents or padding, or that continue a state: segment ids and positions.

    Attributes:
        segment_ids: `[B, T]` number of each token's document, equal numbers side by side, 0 for padding.
        positions: `[B, T]` position of each token in its document.
        first: `[B]` segment id that the row begins with, to which the memory before the row belongs.
        last: `[B]` segment id that the row ends with, to which the memory after the row belongs.
        tokens: `[B]` tokens of the last document so far.
    """

    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    first: Int[Array, " B"]
    last: Int[Array, " B"]
    tokens: Int[Array, " B"]


class PriorContext(NamedTuple):
    """Context before the rows: the memory of finished groups, and the tokens just before.

    Attributes:
        memory: `[B, K, D, E]` `sum k v^T` over finished groups, float32 or better.
        keys: `[B, P, K, D]` of the tokens just before the row, the last one last, as they are scored (of length one
            if keys are scaled): of the unfinished group at least.
        values: `[B, P, K, E]`, as far back as the convolution reaches.
        positions: `[B, P]` of these tokens, -1 where there is none.
        known: `[B, P]` whether the memory holds the token.
    """

    memory: Float[Array, "B K D E"]
    keys: Float[Array, "B P K D"]
    values: Float[Array, "B P K E"]
    positions: Int[Array, "B P"]
    known: Bool[Array, "B P"]

    def of_length(self, length: int) -> "PriorContext":
        """The same with `length` tokens before the row: the last ones, or with absent ones before them."""
        have = self.positions.shape[1]
        missing, extra = max(length - have, 0), max(have - length, 0)

        def fit(rows: Array, value: int = 0) -> Array:
            pad = ((0, 0), (missing, 0), *((0, 0),) * (rows.ndim - 2))
            return jnp.pad(rows[:, extra:], pad, constant_values=value)

        return PriorContext(self.memory, fit(self.keys), fit(self.values), fit(self.positions, -1), fit(self.known))


class AugmentedProblem(NamedTuple):
    """Inputs of every implementation.

    Attributes:
        queries: `[B, T, H, D]`.
        keys: `[B, T, K, D]`, H a multiple of K.
        values: `[B, T, K, E]`.
        alpha: `[H]` factor of the grouped branch, None to leave it out.
        taps: `[H, W]` convolution filter, lag 0 first, None to leave it out.
        packed: segment ids and positions; None where every row is one document from its beginning.
        prior: context before the rows; None for nothing. It needs `packed`.
    """

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    alpha: Float[Array, " H"] | None
    taps: Float[Array, "H W"] | None
    packed: PackedRows | None = None
    prior: PriorContext | None = None


class AugmentedResult(NamedTuple):
    """Outputs, the memory before every block (None if not asked for) and the memory after the rows; float32."""

    outputs: Float[Array, "B T H E"]
    before: Float[Array, "B n K D E"] | None
    after: Float[Array, "B K D E"]


class AugmentedGradients(NamedTuple):
    """Gradients of a problem's arrays; those of the prior context are of its memory, keys and values."""

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    alpha: Float[Array, " H"] | None
    taps: Float[Array, "H W"] | None
    prior: tuple[Float[Array, "B K D E"], Float[Array, "B P K D"], Float[Array, "B P K E"]] | None


@dataclass(frozen=True)
class RowBlocks:
    """Blocks of rows, and the windows of keys that they meet pair by pair: the P rows before a block and its own.

    Attributes:
        before: rows P of a window before its block.
        block: rows C of a block, a multiple of P.
        length: tokens T of a row.
    """

    before: int
    block: int
    length: int

    @property
    def blocks(self) -> int:
        """Number of blocks of a row."""
        return -(-self.length // self.block)

    @property
    def width(self) -> int:
        """Rows of a window."""
        return self.before + self.block


@dataclass(frozen=True)
class AugmentedPlan(RowBlocks):
    """Compile-time constants of a program.

    A window holds so many rows that whatever lies before it is in a finished group for every query of the block, and
    beyond the convolution's reach.

    Attributes:
        group: tokens G in a group.
        unit: scale queries and keys to length one.
        local: whether there is a local branch, `relu(q·k)^2`.
    """

    group: int
    unit: bool
    local: bool

    @classmethod
    def of(
        cls, problem: AugmentedProblem, *, group: int, unit: bool, local: bool, block: int, multiple: int
    ) -> "AugmentedPlan":
        """Blocks of about `block` rows, with windows whose sizes are multiples of a number.

        In whole rows, blocks begin where groups do: the window need not hold a group before them, only what the
        convolution reaches.
        """
        length = problem.queries.shape[1]
        reach = 0 if problem.taps is None else problem.taps.shape[1] - 1
        if problem.packed is not None:
            before = rounded(max(group, reach), multiple)
            return cls(before, rounded(min(block, length), before), length, group, unit, local)
        return cls(*blocks_of_groups(length, block, reach, group, multiple), length, group, unit, local)


class PackedWindows(NamedTuple):
    """Packed rows cut up for windows.

    Attributes:
        rows: `[B, 3, T]` segment ids, positions, and whether the memory before the row holds the token.
        first: `[B, 3, P]` the same of the rows before.
        carried: `[B, n + 1]` segment id of the memory's document before each block, and after the row.
        finished: `[B]` tokens of the last document that are in finished groups.
    """

    rows: Int[Array, "B 3 T"]
    first: Int[Array, "B 3 P"]
    carried: Int[Array, "B n_1"]
    finished: Int[Array, " B"]

    @classmethod
    def of(cls, packed: PackedRows, prior: PriorContext | None, plan: AugmentedPlan) -> "PackedWindows":
        """Cuts packed rows up."""
        before = None if prior is None else (prior.positions, prior.known)
        return cls.cut(packed, before, plan, packed.tokens // plan.group * plan.group)

    @classmethod
    def cut(
        cls,
        packed: PackedRows,
        before: tuple[Int[Array, "B P"], Bool[Array, "B P"]] | None,
        plan: RowBlocks,
        finished: Int[Array, " B"],
    ) -> "PackedWindows":
        """Cuts packed rows up, behind tokens of which positions and `known` are given."""
        segment_ids = packed.segment_ids
        rows = jnp.stack([segment_ids, packed.positions, jnp.zeros_like(segment_ids)], axis=1).astype(jnp.int32)
        first = jnp.zeros((rows.shape[0], 3, plan.before), jnp.int32)
        if before is not None:
            positions, known = before
            named = jnp.where(positions >= 0, packed.first[:, None], 0)
            first = jnp.stack([named, jnp.maximum(positions, 0), known], axis=1).astype(jnp.int32)
        index = jax.lax.cummax(jnp.where(segment_ids > 0, jnp.arange(plan.length), -1), axis=1)
        left = jnp.arange(1, plan.blocks) * plan.block - plan.before - 1
        # The first window may begin with the row: then only the prior context has joined the memory.
        index = jnp.where(left >= 0, index[:, jnp.maximum(left, 0)], -1)
        found = jnp.take_along_axis(segment_ids, jnp.maximum(index, 0), axis=1)
        middle = jnp.where(index >= 0, found, packed.first[:, None])
        carried = jnp.concatenate([packed.first[:, None], middle, packed.last[:, None]], axis=1)
        return cls(rows, first, carried.astype(jnp.int32), finished.astype(jnp.int32))


def convolution_matrix(taps: Float[Array, "H W"], plan: AugmentedPlan) -> Float[Array, "H C M"]:
    """The convolution of a block's rows as a matrix over its window."""
    lag, inside = _lags(taps.shape[1], plan)
    return jnp.where(inside, taps[:, jnp.clip(lag, 0, taps.shape[1] - 1)], 0)


def taps_gradient(matrix: Float[Array, "H C M"], width: int, plan: AugmentedPlan) -> Float[Array, "H W"]:
    """The gradient of the taps, given that of the matrix."""
    lag, inside = _lags(width, plan)
    index = jnp.where(inside, lag, width)
    return jax.vmap(lambda part: jnp.zeros((width + 1,), part.dtype).at[index].add(part))(matrix)[:, :width]


def rounded(number: int, multiple: int) -> int:
    """The smallest multiple that is not below a number."""
    return -(-number // multiple) * multiple


def blocks_of_groups(length: int, block: int, reach: int, group: int, multiple: int) -> tuple[int, int]:
    """Rows before a block, at least `reach`, and of a block: about `block`, whole groups, multiples of a number."""
    size = rounded(min(block, length), math.lcm(group, multiple))
    size = rounded(reach, size) if reach > size else size
    before = next(each for each in range(multiple, size + 1, multiple) if size % each == 0 and each >= reach)
    return before, size


def _lags(width: int, plan: AugmentedPlan) -> tuple[Array, Array]:
    lag = jnp.arange(plan.block)[:, None] + plan.before - jnp.arange(plan.width)
    return lag, (lag >= 0) & (lag < width)
