"""What linear attention is computed from, and how its rows are cut into blocks."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Memory(NamedTuple):
    """What is left of the tokens so far, float32 or better.

    Attributes:
        values: `[B, K, D, E]` `sum decay^age k v^T`.
        keys: `[B, K, D]` `sum decay^age k`.
    """

    values: Float[Array, "B K D E"]
    keys: Float[Array, "B K D"]


class Problem(NamedTuple):
    """What every implementation reads.

    Attributes:
        queries: `[B, T, H, D]`.
        keys: `[B, T, K, D]`, H a multiple of K.
        values: `[B, T, K, E]`.
        log_decay: `[K]` float32, None for no decay.
        documents: `[B, T]` document of each token, equal numbers side by side, 0 for padding; None for whole rows.
        start: what came before the rows; it belongs to their first document.
    """

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    log_decay: Float[Array, " K"] | None
    documents: Int[Array, "B T"] | None
    start: Memory


class ProblemGradients(NamedTuple):
    """Gradients of a problem's arrays."""

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    start: Memory


@dataclass(frozen=True)
class Plan:
    """What is fixed when a program is compiled.

    Attributes:
        block: rows C of a block.
        length: tokens T of a row.
        floor: what sums are divided by at least, None to leave them.
    """

    block: int
    length: int
    floor: float | None

    @property
    def blocks(self) -> int:
        """How many blocks a row has."""
        return -(-self.length // self.block)


class Placed(NamedTuple):
    """Documents cut up for blocks.

    A row's clock counts the tokens that are there, so that padding does not age what came before it.

    Attributes:
        rows: `[B, 2, T]` documents, and the clock at each token, from 1.
        carried: `[B, n + 1]` the document that the memory speaks of before each block, and after the row.
        clock: `[B, n + 1]` the clock before each block, and after the row.
    """

    rows: Int[Array, "B 2 T"]
    carried: Int[Array, "B n_1"]
    clock: Int[Array, "B n_1"]

    @classmethod
    def of(cls, documents: Int[Array, "B T"], plan: Plan) -> "Placed":
        """Cuts documents up."""
        there = documents > 0
        index = jnp.arange(plan.length)
        first = jnp.take_along_axis(documents, jnp.argmax(there, axis=1)[:, None], axis=1)
        ends = jnp.minimum(jnp.arange(1, plan.blocks + 1) * plan.block, plan.length) - 1
        last = jnp.max(jnp.where(there[:, None] & (index <= ends[:, None]), index, -1), axis=2)
        found = jnp.take_along_axis(documents, jnp.maximum(last, 0), axis=1)
        carried = jnp.concatenate([first, jnp.where(last < 0, first, found)], axis=1)
        time = jnp.cumsum(there, axis=1)
        clock = jnp.concatenate([jnp.zeros_like(first), time[:, ends]], axis=1)
        rows = jnp.stack([documents, time], axis=1)
        return cls(rows.astype(jnp.int32), carried.astype(jnp.int32), clock.astype(jnp.int32))
