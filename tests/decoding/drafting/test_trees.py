"""Trees hold the guesses that they name: static, dynamic, of a union; and trees by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.decoding import DraftTree, DynamicTree, UnionDrafter, chain, parse_tree
from lin_jax.decoding.drafting.api import Draft, DraftContext, Guesses, Stateless, TreeLevel, best_guesses
from lin_jax.decoding.drafting.dynamic_tree import ancestry
from lin_jax.decoding.drafting.tree import MC_SIM_7B_63, tree_text
from lin_jax.errors import UserError

VOCABULARY = 6
Path = tuple[int, ...]


class TableDrafter(Stateless):
    """Logits that depend on the row, the depth, the token and the token above it."""

    depth, width = 4, 5

    def __init__(self, seed: int = 0) -> None:
        size = (3, self.depth, VOCABULARY + 1, VOCABULARY, VOCABULARY)
        self.table = np.random.default_rng(seed).normal(size=size).astype(np.float32)

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, Any]:
        return None, jnp.full((context.root.shape[0], 1), VOCABULARY)

    def expand(self, shared: Any, carried: Any, level: TreeLevel) -> tuple[Guesses, Any]:
        rows = jnp.arange(carried.shape[0])[:, None]
        logits = jnp.asarray(self.table)[rows, level.depth, carried, jnp.maximum(level.tokens, 0)]
        return best_guesses(logits, level), jnp.maximum(level.tokens, 0)

    def log_probs(self, row: int, path: Path) -> np.ndarray:
        above = path[-2] if len(path) > 1 else VOCABULARY
        logits = self.table[row, len(path) - 1, above, path[-1]]
        return logits - np.log(np.exp(logits).sum())


def context(roots: list[int]) -> DraftContext:
    return DraftContext(jnp.asarray(roots), jnp.zeros((len(roots), 1)), jnp.zeros((len(roots), 0), int))


def paths_of(draft: Draft, row: int) -> dict[int, Path]:
    """The tokens from the root to each node."""
    paths: dict[int, Path] = {}
    for node, (token, parent) in enumerate(zip(draft.tokens[row].tolist(), draft.parents[row].tolist(), strict=True)):
        paths[node] = (*paths[parent], token) if node else (token,)
    return paths


def test_static_trees_hold_the_ranks_they_name() -> None:
    drafter, roots = TableDrafter(), [1, 4, 0]
    tree = DraftTree(((0,), (2,), (3,), (0, 1), (2, 0), (2, 2), (2, 0, 4), (2, 0, 4, 1)))
    draft = jax.jit(lambda: tree.grow(drafter, context(roots), None))()
    for row, root in enumerate(roots):
        paths = paths_of(draft, row)
        for ranks in tree.paths:
            expected: Path = (root,)
            for rank in ranks:
                expected = (*expected, int(np.argsort(-drafter.log_probs(row, expected), kind="stable")[rank]))
            assert paths[tree.paths.index(ranks) + 1] == expected


@pytest.mark.parametrize("tree", [DynamicTree(6, 3, 2, 2), DynamicTree(12, 4, 3, 4), DynamicTree(2, 1, 1, 1)])
def test_dynamic_trees_hold_the_likeliest_nodes(tree: DynamicTree) -> None:
    drafter, roots = TableDrafter(3), [1, 4, 0]
    draft = jax.jit(lambda: tree.grow(drafter, context(roots), None))()
    for row, root in enumerate(roots):
        found: dict[Path, float] = {}
        level: dict[Path, float] = {(root,): 0.0}
        for _ in range(tree.depth):
            children = {}
            for path, likely in level.items():
                log_probs = drafter.log_probs(row, path)
                for token in np.argsort(-log_probs)[: tree.width]:
                    children[*path, int(token)] = likely + float(log_probs[token])
            found |= children
            level = dict(sorted(children.items(), key=lambda each: -each[1])[: tree.beam])
        best = sorted(found, key=lambda path: -found[path])[: tree.size - 1]
        assert sorted(paths_of(draft, row).values()) == sorted([(root,), *best])


def test_ancestry() -> None:
    parents = [0, 0, 1, 1, 3, 0, 5]
    tree = ancestry(jnp.asarray([parents]), 3)
    for node in range(len(parents)):
        above, here = {node}, node
        while here:
            here = parents[here]
            above.add(here)
        assert set(np.flatnonzero(tree.ancestors[0, node])) == above
        assert int(tree.depth[0, node]) == len(above) - 1


def test_a_union_offers_all_and_a_dynamic_tree_none_twice() -> None:
    """Ranks count on from one drafter to the next; what both guess is one node, with the likelier guess."""
    one, other = TableDrafter(0), TableDrafter(1)
    both = UnionDrafter(one, other)
    assert (both.depth, both.width) == (4, 10)
    trees = DraftTree(((0,), (5,), (5, 6))), DynamicTree(8, 2, 3, 6)
    draft, moving = jax.jit(lambda: [tree.grow(both, context([1, 4, 0]), (None, None)) for tree in trees])()
    for row, root in enumerate([1, 4, 0]):
        expected = (root, int(np.argmax(other.log_probs(row, (root,)))))
        paths = paths_of(draft, row)
        assert paths[1] == (root, int(np.argmax(one.log_probs(row, (root,)))))
        assert paths[2] == expected
        assert paths[3] == (*expected, int(np.argsort(-other.log_probs(row, expected), kind="stable")[1]))
        everything = list(paths_of(moving, row).values())
        assert len(set(everything)) == len(everything) == 8


@pytest.mark.parametrize(
    "text", ["chain:x", "0;0,0,0", "a", "0,-1", "", "dynamic:8", "dynamic:99:2:2:2", "dynamic:1:1"]
)
def test_bad_trees(text: str) -> None:
    with pytest.raises(UserError, match=r"(draft|dynamic) tree"):
        parse_tree(text)


def test_tree_names() -> None:
    assert parse_tree("chain:3") == chain(3) == DraftTree(((0,), (0, 0), (0, 0, 0)))
    assert parse_tree("0;1;0,1") == DraftTree(((0,), (1,), (0, 1)))
    assert parse_tree("mc_sim_7b_63") is MC_SIM_7B_63
    assert MC_SIM_7B_63.size == 64
    assert parse_tree("dynamic:9:3") == DynamicTree(9, 3)
    for tree in (DraftTree(), chain(2), MC_SIM_7B_63, DynamicTree(7, 3, 2, 3)):
        assert parse_tree(tree_text(tree)) == tree
