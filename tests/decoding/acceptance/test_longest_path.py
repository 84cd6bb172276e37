"""Longest accepted path against a search in plain Python."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from lin_jax.decoding import DraftTree
from lin_jax.decoding.acceptance.longest_path import accept
from lin_jax.decoding.drafting.api import Draft


def test_acceptance() -> None:
    rng = np.random.default_rng(1)
    tree = DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)))
    tokens, targets = rng.integers(0, 2, (50, tree.size)), rng.integers(0, 2, (50, tree.size))
    tokens[rng.random(tokens.shape) < 0.1] = -1
    parents = jnp.broadcast_to(jnp.asarray((0, *tree.parents[1:])), tokens.shape)
    accepted = accept(Draft(jnp.asarray(tokens), parents, tree.arrays()), jnp.asarray(targets), tree.depth + 1)
    for row in range(50):
        best = [0]
        for path in tree.paths:
            nodes = [0, *(tree.paths.index(path[: d + 1]) + 1 for d in range(len(path)))]
            good = all(tokens[row, b] == targets[row, a] for a, b in pairwise(nodes))
            if good and len(nodes) > len(best):
                best = nodes
        length = int(accepted.length[row])
        assert accepted.path[row, :length].tolist() == best
        assert accepted.emitted[row, :length].tolist() == targets[row, best].tolist()
