"""Static draft trees: each node is a path of ranks into the drafter's guesses; and names of trees."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lin_jax.attention import TreeArrays, tree_arrays
from lin_jax.decoding.drafting.api import Draft, DraftContext, Drafter, Drawing, ScoringDrafter, TreeLevel
from lin_jax.decoding.drafting.dynamic_tree import MAX_NODES, DynamicTree
from lin_jax.decoding.engine.sampling import draw_children
from lin_jax.errors import UserError

NodePath = tuple[int, ...]


@dataclass(frozen=True)
class DraftTree:
    """Tree of guesses below the root, node 0, which is the token already chosen.

    The node at `paths[i - 1] = (r_1, ..., r_d)` holds the guess of rank `r_d` at depth d, below the node at
    `(r_1, ..., r_{d-1})`.

    Attributes:
        paths: every node but the root, sorted by length, then by ranks.
    """

    paths: tuple[NodePath, ...] = ()

    def __post_init__(self) -> None:
        if list(self.paths) != sorted(set(self.paths), key=lambda path: (len(path), path)):
            object.__setattr__(self, "paths", tuple(sorted(set(self.paths), key=lambda path: (len(path), path))))
        known = {(), *self.paths}
        for path in self.paths:
            if not path or min(path) < 0:
                raise UserError(f"draft tree: {list(path)} is not a path; give ranks from 0, one for each depth")
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
        """Number of guesses that a drafter must offer per node: the largest rank plus one."""
        return max((path[-1] + 1 for path in self.paths), default=0)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent of each node, -1 for the root."""
        number = {(): 0, **{path: i + 1 for i, path in enumerate(self.paths)}}
        return (-1, *(number[path[:-1]] for path in self.paths))

    def arrays(self) -> TreeArrays:
        """Depths and ancestry, as attention takes them."""
        return tree_arrays(self.parents)

    @cached_property
    def internal(self) -> tuple[int, ...]:
        """Internal nodes, that is those that have children, in order."""
        return tuple(sorted(set(self.parents) - {-1}))

    @cached_property
    def levels(self) -> tuple["LevelShape", ...]:
        """Shape of each level, from the root's children down."""
        paths: list[NodePath] = [(), *self.paths]
        shapes: list[LevelShape] = []
        above: list[NodePath] = [()]
        for depth in range(self.depth):
            nodes = [path for path in paths if len(path) == depth and paths.index(path) in self.internal]
            children = [path for path in self.paths if len(path) == depth + 1]
            shapes.append(
                LevelShape(
                    nodes=tuple(paths.index(path) for path in nodes),
                    parent_slots=tuple(above.index(path[:-1]) for path in nodes),
                    slots=tuple(nodes.index(path[:-1]) for path in children),
                    ranks=tuple(path[-1] for path in children),
                    needed=frozenset(path[-1] for path in self.paths if len(path) > depth),
                )
            )
            above = nodes
        return tuple(shapes)

    def grow(self, drafter: Drafter, context: DraftContext, state: Any, drawing: Drawing | None = None) -> Draft:
        """Fills the tree with a drafter's best guesses, or with `drawing` with children drawn at random.

        Args:
            drafter: the drafter; with `drawing` it must be a `ScoringDrafter`.
            context: the drafter's input.
            state: the drafter's state.
            drawing: options for drawing; a node's first child then is the first draw, whatever its rank.
        """
        tokens = context.root[:, None]
        if not self.paths:
            return self._draft(tokens, None)
        shared, carried = drafter.begin(context, state)
        expanded: tuple[int, ...] = ()
        log_q = []
        for depth, shape in enumerate(self.levels):
            expanded += shape.nodes
            carried = _take_slots(carried, shape.parent_slots)
            level = TreeLevel(
                tokens=tokens[:, np.array(shape.nodes)],
                depth=depth,
                ranks=max(shape.ranks) + 1,
                needed=shape.needed,
                scored=False,
                above=tokens[:, np.array(expanded)],
                tree=self._subtree(expanded),
            )
            if drawing is None:
                guesses, carried = drafter.expand(shared, carried, level)
                found = guesses.tokens[:, np.array(shape.slots), np.array(shape.ranks)]
            else:
                assert isinstance(drafter, ScoringDrafter), "checked by the generator"
                logits, carried = drafter.scores(shared, carried, level)
                log_q.append(jax.nn.log_softmax(logits / drawing.temperature))
                drawn = draw_children(
                    log_q[-1],
                    shape.max_children,
                    drawing.positions,
                    drawing.rows,
                    jnp.asarray(shape.nodes),
                    drawing.seed,
                )
                found = drawn[:, np.array(shape.slots), np.array(shape.orders)]
            known = level.tokens[:, np.array(shape.slots)] >= 0
            tokens = jnp.concatenate([tokens, jnp.where(known, found, -1)], axis=1)
        return self._draft(tokens, jnp.concatenate(log_q, axis=1) if log_q else None)

    def _draft(self, tokens: Int[Array, "B N"], log_q: Array | None) -> Draft:
        parents = jnp.broadcast_to(jnp.asarray((0, *self.parents[1:])), tokens.shape)
        return Draft(tokens, parents, self.arrays(), log_q)

    def _subtree(self, nodes: tuple[int, ...]) -> TreeArrays:
        return tree_arrays(tuple(-1 if not node else nodes.index(self.parents[node]) for node in nodes))


def _take_slots(carried: Any, slots: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda part: part[:, np.array(slots)], carried)


# Any draft tree; `grow` fills it with a drafter's guesses.
AnyTree = DraftTree | DynamicTree


class LevelShape(NamedTuple):
    """Parent and child nodes of one level of a static tree.

    Attributes:
        nodes: the nodes that get children.
        parent_slots: for each of `nodes`, the index of its parent among the nodes of the level above.
        slots: for each child, the index of its parent among `nodes`.
        ranks: for each child, its rank.
        needed: ranks of the children and of all nodes further down.
    """

    nodes: tuple[int, ...]
    parent_slots: tuple[int, ...]
    slots: tuple[int, ...]
    ranks: tuple[int, ...]
    needed: frozenset[int]

    @property
    def orders(self) -> tuple[int, ...]:
        """For each child, its index among its parent's children."""
        return tuple(self.slots[:index].count(slot) for index, slot in enumerate(self.slots))

    @property
    def max_children(self) -> int:
        """Largest number of children of one node."""
        return max(self.orders) + 1


def chain(length: int) -> DraftTree:
    """Tree without branches: the best guess at each of `length` depths."""
    return DraftTree(tuple((0,) * depth for depth in range(1, length + 1)))


def parse_tree(text: str) -> AnyTree:
    """Parses a tree's name, or paths such as `0;1;0,0;0,1`.

    Names are `none`, `chain:LENGTH`, `mc_sim_7b_63`, and `dynamic:SIZE:DEPTH`, optionally with `:BEAM:WIDTH` behind it.

    Raises:
        UserError: neither a name nor paths.
    """
    if text == "none":
        return DraftTree()
    if text == "mc_sim_7b_63":
        return MC_SIM_7B_63
    try:
        if text.startswith("chain:"):
            length = int(text.removeprefix("chain:"))
            if not 0 <= length < MAX_NODES:
                raise UserError(f"draft tree '{text}' is no chain of 0 to {MAX_NODES - 1} guesses; give such a length")
            return chain(length)
        if text.startswith("dynamic:"):
            return DynamicTree(*(int(number) for number in text.removeprefix("dynamic:").split(":")))
        if text.count(";") + 1 >= MAX_NODES:
            raise UserError(f"the draft tree has {text.count(';') + 1} paths; give fewer than {MAX_NODES}")
        return DraftTree(tuple(tuple(int(rank) for rank in path.split(",")) for path in text.split(";")))
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"draft tree '{text[:60]}' is not understood; give none, chain:LENGTH, mc_sim_7b_63, dynamic:SIZE:DEPTH or "
            "paths such as 0;1;0,0"
        ) from None


def tree_text(tree: AnyTree) -> str:
    """Text of a tree, as `parse_tree` reads it."""
    if isinstance(tree, DynamicTree):
        return f"dynamic:{tree.size}:{tree.depth}:{tree.beam}:{tree.width}"
    return ";".join(",".join(map(str, path)) for path in tree.paths) or "none"


# The tree of Medusa's publication (Cai et al. 2024), for heads of a 7B model: 63 guesses, four deep.
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
