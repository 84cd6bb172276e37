"""Rows of a batch in parts that XLA computes side by side on a CPU.

XLA for CPUs runs a product of many small matrices, as attention is made of, on one thread: half of two processors is
idle then. It runs operations side by side that do not need each other, though: as many as there are processors.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.implementations import target_platform

# Tokens of a part, at least: less is quicker than handing it over, and programs of tests stay small.
_LEAST_TOKENS = 512
# More parts compile longer than they gain.
_MOST_PARTS = 8


def row_parts(rows: int, tokens: int) -> int:
    """Number of parts, a divisor of the rows: 1 where it is not for a CPU, on a mesh, and where there is little to do.

    Args:
        rows: of the batch.
        tokens: of a row.
    """
    if target_platform() != "cpu" or jax.sharding.get_abstract_mesh().shape:
        return 1
    most = min(_processors(), _MOST_PARTS, rows * tokens // _LEAST_TOKENS)
    return max((parts for parts in range(1, most + 1) if rows % parts == 0), default=1)


def by_row_parts(apply: Callable[[Any], Any], tree: Any, parts: int) -> Any:
    """`apply(tree)`, whose leaves and results begin with an axis of rows, a part of the rows at a time."""
    if parts == 1:
        return apply(tree)
    size = jax.tree.leaves(tree)[0].shape[0] // parts
    pieces = (jax.tree.map(lambda leaf, at=at: leaf[at * size : (at + 1) * size], tree) for at in range(parts))
    return jax.tree.map(lambda *each: jnp.concatenate(each), *map(apply, pieces))


def _processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
