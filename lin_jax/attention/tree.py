"""The shape of a draft tree as arrays: what attention needs to know of it."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class TreeArrays(NamedTuple):
    """Depths and ancestry of the `N` nodes of a tree; node 0 is the root. A leading batch axis is allowed."""

    depth: Int[Array, "*B N"]
    ancestors: Bool[Array, "*B N N"]
    """Whether node j is node i or above it, at `[i, j]`."""


def tree_arrays(parents: tuple[int, ...]) -> TreeArrays:
    """Depths and ancestry from each node's parent; the root, node 0, has parent -1 and parents precede children.

    Raises:
        ValueError: a parent does not precede its child.
    """
    count = len(parents)
    depth = np.zeros(count, np.int32)
    ancestors = np.eye(count, dtype=bool)
    for node, parent in enumerate(parents):
        if not -1 <= parent < node or (parent == -1) != (node == 0):
            raise ValueError(f"node {node} has parent {parent}; node 0 is the root (-1), others follow their parent")
        if node:
            depth[node] = depth[parent] + 1
            ancestors[node] |= ancestors[parent]
    return TreeArrays(jnp.asarray(depth), jnp.asarray(ancestors))
