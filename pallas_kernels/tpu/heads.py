"""Layout of heads for TPU programs: side by side in the last axis, as many in a program as fill whole lanes."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

LANES = 128
SUBLANES = 8
VMEM_BYTES = 64 * 2**20
# A block in VMEM, or a scalar array in SMEM; None where a docstring says so.
Ref = Any


class ProgramHeads(NamedTuple):
    """The heads that one program handles: `together` key/value heads of sizes D and E, with R query heads each."""

    together: int
    share: int
    key_size: int
    value_size: int

    @classmethod
    def of(cls, queries: Float[Array, "B T H D"], values: Float[Array, "B T K E"]) -> "ProgramHeads":
        """As many key/value heads as fill whole lanes; all of them where no smaller number does."""
        kv_heads, value_size = values.shape[2:]
        sizes = queries.shape[3], value_size
        together = math.lcm(*(LANES // math.gcd(LANES, size) for size in sizes))
        together = together if kv_heads % together == 0 else kv_heads
        return cls(together, queries.shape[2] // kv_heads, *sizes)

    def keys(self, head: int) -> slice:
        """Columns of a head of queries or keys."""
        return slice(head * self.key_size, (head + 1) * self.key_size)

    def values(self, head: int) -> slice:
        """Columns of a head of values or outputs."""
        return slice(head * self.value_size, (head + 1) * self.value_size)

    def queries(self, head: int) -> range:
        """The query heads of a key/value head."""
        return range(head * self.share, (head + 1) * self.share)


def flatten_heads(rows: Float[Array, "B T H D"]) -> Float[Array, "B T HD"]:
    """Rows with their heads side by side in the last axis."""
    return rows.reshape(*rows.shape[:2], -1)


def all_rows(rows: int, columns: int) -> pl.BlockSpec:
    """All rows `[B, rows, ...]` of the heads of a program, whose grid is rows of the batch and parts of the heads."""
    return pl.BlockSpec((None, rows, columns), lambda b, k, *_: (b, 0, k))


def upright(row: Float[Array, "1 C"]) -> Float[Array, "C 1"]:
    """A row as a column."""
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def flat(column: Float[Array, "C 1"]) -> Float[Array, "1 C"]:
    """A column as a row."""
    return jnp.broadcast_to(column, (column.shape[0], SUBLANES)).T[:1]
