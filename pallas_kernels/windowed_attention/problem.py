"""Inputs and results of attention over a window and a memory, and the plan by which its rows are cut into blocks."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.augmented_attention.problem import (
    PackedRows,
    PackedWindows,
    RowBlocks,
    blocks_of_groups,
    rounded,
)
from pallas_kernels.linear_attention.problem import Memory
from pallas_kernels.windows.rows import Sinks, early_mask, first_position

Features = Literal["exponential", "hedgehog"]
FEATURES: tuple[Features, ...] = ("exponential", "hedgehog")


class FeatureWeights(NamedTuple):
    """Learnt parts of a feature map, apart for queries and keys.

    Attributes:
        queries: `[H, m, D]` directions.
        keys: `[K, m, D]`.
        query_bias: `[H, m]` of the exponents, None for zero.
        key_bias: `[K, m]` likewise.
    """

    queries: Float[Array, "H m D"]
    keys: Float[Array, "K m D"]
    query_bias: Float[Array, "H m"] | None = None
    key_bias: Float[Array, "K m"] | None = None


class WindowedPrior(NamedTuple):
    """Context before the rows: the memory, and the tokens of the window before the row.

    Attributes:
        memory: of all tokens before the window of the row's first query, decayed up to the last of them.
        keys: `[B, P, K, D]` of the tokens just before the row that the memory lacks, the last one last.
        values: `[B, P, K, E]`.
        log_decays: `[B, P, K]` logarithms of their decay; None without decay.
        positions: `[B, P]` of these tokens, -1 where there is none.
        sink_keys: `[B, S, K, D]` of the document's first tokens, that of position p in slot p; None without sinks.
        sink_values: `[B, S, K, E]` likewise.
    """

    memory: Memory
    keys: Float[Array, "B P K D"]
    values: Float[Array, "B P K E"]
    log_decays: Float[Array, "B P K"] | None
    positions: Int[Array, "B P"]
    sink_keys: Float[Array, "B S K D"] | None = None
    sink_values: Float[Array, "B S K E"] | None = None

    def sinks(self, packed: PackedRows) -> Sinks | None:
        """The sinks before the rows."""
        if self.sink_keys is None or self.sink_values is None:
            return None
        position = first_position(packed.segment_ids, packed.positions)
        return Sinks(self.sink_keys, self.sink_values, early_mask(position, self.sink_keys.shape[1]))

    def without_sinks(self, sinks: int) -> "WindowedPrior":
        """The same without its sinks, in the window either."""
        positions = jnp.where(self.positions < sinks, -1, self.positions)
        return self._replace(positions=positions, sink_keys=None, sink_values=None)

    def of_length(self, length: int) -> "WindowedPrior":
        """The same with `length` tokens before the row: the last ones, or with absent ones before them."""
        have = self.positions.shape[1]
        missing, extra = max(length - have, 0), max(have - length, 0)

        def fit(rows: Any, value: int = 0) -> Any:
            pad = ((0, 0), (missing, 0), *((0, 0),) * (rows.ndim - 2))
            return jnp.pad(rows[:, extra:], pad, constant_values=value)

        decays = None if self.log_decays is None else fit(self.log_decays)
        return self._replace(
            keys=fit(self.keys), values=fit(self.values), log_decays=decays, positions=fit(self.positions, -1)
        )


class WindowedProblem(NamedTuple):
    """Inputs of every implementation.

    Attributes:
        queries: `[B, T, H, D]`.
        keys: `[B, T, K, D]`, H a multiple of K.
        values: `[B, T, K, E]`.
        weights: the feature map's own, float32 or better; kernels take `[heads, M, D]`, linear in all exponents.
        balance: `[H]` logarithm of the memory's factor, float32.
        log_decays: `[B, T, K]` logarithms of each token's decay, float32; None without decay.
        packed: segment ids and positions; None where every row is one document from its beginning.
        prior: context before the rows; None for nothing. It needs `packed`.
    """

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    weights: FeatureWeights
    balance: Float[Array, " H"]
    log_decays: Float[Array, "B T K"] | None
    packed: PackedRows | None = None
    prior: WindowedPrior | None = None

    @property
    def features(self) -> int:
        """Features M of a key."""
        return self.weights.keys.shape[1]


class WindowedResult(NamedTuple):
    """Outputs, the memory before every block (None if not asked for, of a form of its own) and after the rows.

    `totals` are the logarithms of the sums of weights, `[B, H, T]` float32; None without sinks.
    """

    outputs: Float[Array, "B T H E"]
    before: Any
    after: Memory
    totals: Float[Array, "B H T"] | None = None


class WindowedGradients(NamedTuple):
    """Gradients of a problem's arrays; those of the prior context are of its memory, keys, values and decays."""

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    weights: FeatureWeights
    balance: Float[Array, " H"]
    log_decays: Float[Array, "B T K"] | None
    prior: tuple[Memory, Array, Array, Array | None] | None


@dataclass(frozen=True)
class AttentionWindowPlan:
    """The window of each query, and the scores in it.

    Attributes:
        tokens: a sliding window holds exactly this many, the query's own included; None is a window of groups.
        group: tokens of a group.
        groups: finished groups before the query's own that a window of groups holds.
        scale: factor of q·k.
        features: the feature map's name.
        sinks: tokens at the beginning of a document that kernels leave out altogether.
    """

    tokens: int | None
    group: int
    groups: int
    scale: float
    features: Features
    sinks: int = 0

    def start(self, positions: Array) -> Array:
        """Positions at which the windows of queries begin, negative ones included."""
        if self.tokens is not None:
            return positions - self.tokens + 1
        group = jax.lax.div(jnp.maximum(positions, 0), jnp.asarray(self.group, positions.dtype))
        return (group - self.groups) * self.group


@dataclass(frozen=True)
class WindowedPlan(RowBlocks):
    """Compile-time constants of a program.

    A block's window holds so many rows that whatever lies before it is before the window of every query of the block.

    Attributes:
        window: of each query.
    """

    window: AttentionWindowPlan

    @classmethod
    def of(cls, problem: WindowedProblem, window: AttentionWindowPlan, *, block: int, multiple: int) -> "WindowedPlan":
        """Blocks of about `block` rows, with windows whose sizes are multiples of a number."""
        length = problem.queries.shape[1]
        if window.tokens is None and problem.packed is None:
            return cls(
                *blocks_of_groups(length, block, window.groups * window.group, window.group, multiple), length, window
            )
        reach = (window.groups + 1) * window.group if window.tokens is None else window.tokens - 1
        before = rounded(max(reach, 1), multiple)
        return cls(before, rounded(min(block, length), before), length, window)


def packed_windows(problem: WindowedProblem, plan: WindowedPlan) -> PackedWindows | None:
    """Packed rows cut up for windows; None for whole rows."""
    if problem.packed is None:
        return None
    before = None
    if problem.prior is not None:
        positions = problem.prior.positions
        before = positions, jnp.zeros(positions.shape, bool)
    finished = jnp.maximum(plan.window.start(problem.packed.tokens), 0)
    return PackedWindows.cut(problem.packed, before, plan, finished)
