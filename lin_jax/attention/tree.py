"""Draft trees as arrays, from the parents of their nodes."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.types import TreeArrays


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
