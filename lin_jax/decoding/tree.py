"""Draft trees of fixed shape: each node is a path of ranks into the drafters' guesses."""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lin_jax.attention import TreeArrays, tree_arrays
from lin_jax.errors import UserError

Path = tuple[int, ...]


@dataclass(frozen=True)
class DraftTree:
    """A tree of guesses on top of the root, node 0, which is the token already chosen.

    The node at `paths[i - 1] = (r_1, ..., r_d)` holds guess number `r_d` for depth d, under the node at
    `(r_1, ..., r_{d-1})`.

    Attributes:
        paths: every node but the root, sorted by length, then by ranks.
    """

    paths: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if list(self.paths) != sorted(set(self.paths), key=lambda path: (len(path), path)):
            object.__setattr__(self, "paths", tuple(sorted(set(self.paths), key=lambda path: (len(path), path))))
        known = {(), *self.paths}
        for path in self.paths:
            if not path or min(path) < 0:
                raise UserError(f"draft tree: {list(path)} is no path; give ranks from 0, one for each depth")
            if path[:-1] not in known:
                raise UserError(f"draft tree: {list(path)} has no parent; add {list(path[:-1])}")

    @property
    def size(self) -> int:
        """Number of nodes N, the root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""
        return max((len(path) for path in self.paths), default=0)

    @property
    def width(self) -> int:
        """How many guesses a depth must offer: the largest rank plus one."""
        return max((path[-1] + 1 for path in self.paths), default=0)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The parent of each node, -1 for the root."""
        number = {(): 0, **{path: i + 1 for i, path in enumerate(self.paths)}}
        return (-1, *(number[path[:-1]] for path in self.paths))

    def arrays(self) -> TreeArrays:
        """Depths and ancestry, as attention wants them."""
        return tree_arrays(self.parents)

    def chains(self) -> Int[Array, "N P"]:
        """The nodes from the root down to each node, repeated at the end up to `P = depth + 1`."""
        table = np.zeros((self.size, self.depth + 1), np.int32)
        for node, path in enumerate(((), *self.paths)):
            if node:
                table[node] = table[self.parents[node]]
                table[node, len(path) :] = node
        return jnp.asarray(table)

    def place(self, root: Int[Array, " B"], guesses: Int[Array, "B M R"]) -> Int[Array, "B N"]:
        """The tokens of all nodes; -1 where there is no guess."""
        depths = np.array([len(path) - 1 for path in self.paths], np.int32)
        ranks = np.array([path[-1] for path in self.paths], np.int32)
        return jnp.concatenate([root[:, None], guesses[:, depths, ranks]], axis=1)


def chain(length: int) -> DraftTree:
    """The tree without branches: the best guess at each of `length` depths."""
    return DraftTree(tuple((0,) * depth for depth in range(1, length + 1)))


def parse_tree(text: str) -> DraftTree:
    """A tree from its name (`chain:4`, `mc_sim_7b_63`, `none`) or from paths such as `0;1;0,0;0,1`.

    Raises:
        UserError: neither a name nor paths.
    """
    if text == "none":
        return DraftTree()
    if text == "mc_sim_7b_63":
        return MC_SIM_7B_63
    try:
        if text.startswith("chain:"):
            return chain(int(text.removeprefix("chain:")))
        return DraftTree(tuple(tuple(int(rank) for rank in path.split(",")) for path in text.split(";")))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"draft tree '{text}' is not understood; give none, chain:LENGTH, mc_sim_7b_63 or paths such as 0;1;0,0"
        ) from None


# The tree that Medusa was published with, for heads of a 7B model: 63 guesses, four deep.
MC_SIM_7B_63 = DraftTree(
    tuple((rank,) for rank in range(10))
    + tuple((0, rank) for rank in range(10))
    + tuple((1, rank) for rank in range(7))
    + tuple((2, rank) for rank in range(3))
    + tuple((3, rank) for rank in range(2))
    + tuple((first, 0) for first in range(4, 10))
    + tuple((0, 0, rank) for rank in range(10))
    + tuple((0, 1, rank) for rank in range(3))
    + tuple((0, 2, rank) for rank in range(2))
    + tuple((0, second, 0) for second in range(3, 8))
    + ((1, 0, 0), (1, 0, 1), (2, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1))
)
