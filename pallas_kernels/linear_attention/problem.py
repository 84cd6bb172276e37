"""Inputs and results of linear attention, and the plan by which its rows are cut into blocks."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Memory(NamedTuple):
    """Memory and normaliser after the tokens so far, float32 or better.

    Attributes:
        values: `[B, K, D, E]` `sum decay^age k v^T`.
        keys: `[B, K, D]` `sum decay^age k`.
    """

    values: Float[Array, "B K D E"]
    keys: Float[Array, "B K D"]


class LinearProblem(NamedTuple):
    """Inputs of every implementation.

    Attributes:
        queries: `[B, T, H, D]`.
        keys: `[B, T, K, D]`, H a multiple of K.
        values: `[B, T, K, E]`.
        log_decay: `[K]` float32, None for no decay.
        segment_ids: `[B, T]` number of each token's document, side by side, 0 for padding; None for whole rows.
        start: memory before the rows, of their first document.
    """

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    log_decay: Float[Array, " K"] | None
    segment_ids: Int[Array, "B T"] | None
    start: Memory


class LinearGradients(NamedTuple):
    """Gradients of a problem's arrays."""

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    start: Memory


@dataclass(frozen=True)
class LinearPlan:
    """Compile-time constants of a program.

    Attributes:
        block: rows C of a block.
        length: tokens T of a row.
        floor: least divisor of sums, None to leave them undivided.
    """

    block: int
    length: int
    floor: float | None

    @property
    def blocks(self) -> int:
        """Number of blocks of a row."""
        return -(-self.length // self.block)


class PackedBlocks(NamedTuple):
    """Packed rows cut up for blocks.

    A row's clock counts the tokens that are there, so that padding does not age what came before it.

    Attributes:
        rows: `[B, 2, T]` segment ids, and the clock at each token, from 1.
        carried: `[B, n + 1]` segment id of the memory's document before each block, and after the row.
        clock: `[B, n + 1]` the clock before each block, and after the row.
    """

    rows: Int[Array, "B 2 T"]
    carried: Int[Array, "B n_1"]
    clock: Int[Array, "B n_1"]

    @classmethod
    def of(cls, segment_ids: Int[Array, "B T"], plan: LinearPlan) -> "PackedBlocks":
        """Cuts packed rows up."""
        there = segment_ids > 0
        index = jnp.arange(plan.length)
        first = jnp.take_along_axis(segment_ids, jnp.argmax(there, axis=1)[:, None], axis=1)
        ends = jnp.minimum(jnp.arange(1, plan.blocks + 1) * plan.block, plan.length) - 1
        last = jnp.max(jnp.where(there[:, None] & (index <= ends[:, None]), index, -1), axis=2)
        found = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)
        carried = jnp.concatenate([first, jnp.where(last < 0, first, found)], axis=1)
        time = jnp.cumsum(there, axis=1)
        clock = jnp.concatenate([jnp.zeros_like(first), time[:, ends]], axis=1)
        rows = jnp.stack([segment_ids, time], axis=1)
        return cls(rows.astype(jnp.int32), carried.astype(jnp.int32), clock.astype(jnp.int32))
