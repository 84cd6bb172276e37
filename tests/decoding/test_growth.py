"""How trees grow, what prompt lookup finds, and which path is accepted: each against a plain Python version."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.decoding import DraftTree, DynamicTree, NgramDrafter, UnionDrafter
from lin_jax.decoding.acceptance import accept
from lin_jax.decoding.draft import Draft, DraftContext, Guesses, Layer, Stateless, best_guesses
from lin_jax.decoding.dynamic import ancestry
from lin_jax.decoding.ngram import find_matches

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

    def expand(self, shared: Any, carried: Any, layer: Layer) -> tuple[Guesses, Any]:
        rows = jnp.arange(carried.shape[0])[:, None]
        logits = jnp.asarray(self.table)[rows, layer.depth, carried, jnp.maximum(layer.tokens, 0)]
        return best_guesses(logits, layer), jnp.maximum(layer.tokens, 0)

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
    draft = tree.grow(drafter, context(roots), None)
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
        layer: dict[Path, float] = {(root,): 0.0}
        for _ in range(tree.depth):
            children = {}
            for path, likely in layer.items():
                log_probs = drafter.log_probs(row, path)
                for token in np.argsort(-log_probs)[: tree.width]:
                    children[*path, int(token)] = likely + float(log_probs[token])
            found |= children
            layer = dict(sorted(children.items(), key=lambda each: -each[1])[: tree.beam])
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
    draft = DraftTree(((0,), (5,), (5, 6))).grow(both, context([1, 4, 0]), (None, None))
    moving = DynamicTree(8, 2, 3, 6).grow(both, context([1, 4, 0]), (None, None))
    for row, root in enumerate([1, 4, 0]):
        expected = (root, int(np.argmax(other.log_probs(row, (root,)))))
        paths = paths_of(draft, row)
        assert paths[1] == (root, int(np.argmax(one.log_probs(row, (root,)))))
        assert paths[2] == expected
        assert paths[3] == (*expected, int(np.argsort(-other.log_probs(row, expected), kind="stable")[1]))
        everything = list(paths_of(moving, row).values())
        assert len(set(everything)) == len(everything) == 8


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


def occurrences(text: list[int], depth: int, longest: int) -> list[tuple[int, list[int]]]:
    """All earlier places where the last token occurs: how long the match is, and what follows; best first."""
    found = []
    for end in range(len(text) - 1):
        size = 0
        while size < longest and size <= end and text[end - size] == text[len(text) - 1 - size]:
            size += 1
        if size:
            copy = list(text)
            for step in range(depth):
                copy.append(copy[end + 1 + step])
            found.append((size, end, copy[len(text) :]))
    return [(size, followers) for size, _, followers in sorted(found, key=lambda each: (-each[0], -each[1]))]


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 4, n).tolist() for n in (1, 2, 3, 5, 9, 17, 30)] + [[7], [1, 1, 1, 1], [3, 1, 2]]


@pytest.fixture(scope="module")
def recent(texts: list[list[int]]) -> jax.Array:
    return jnp.asarray([[-1] * (32 - len(text)) + text for text in texts])


def test_prompt_lookup(texts: list[list[int]], recent: jax.Array) -> None:
    found = find_matches(recent, 5, 3, 4)
    for row, text in enumerate(texts):
        expected = occurrences(text, 5, 3)[:4]
        sizes = found.sizes[row].tolist()
        assert sizes == [size for size, _ in expected] + [0] * (4 - len(expected))
        assert found.followers[row, : len(expected)].tolist() == [followers for _, followers in expected]


def test_prompt_lookup_grows_a_trie(texts: list[list[int]], recent: jax.Array) -> None:
    """At every node the followers of the occurrences that agree with its path, the best supported first."""
    confidence = (0.3, 0.5, 0.8)
    drafter = NgramDrafter(depth=3, matches=4, lookback=32, confidence=confidence)
    tree = DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (1, 0, 0), (0, 1, 0)))
    begun = DraftContext(recent[:, -1], jnp.zeros((len(texts), 1)), recent)
    draft = tree.grow(drafter, begun, None)
    for row, text in enumerate(texts):
        matches = occurrences(text, 3, 3)[:4]
        children = follow(matches, confidence)
        tokens = draft.tokens[row].tolist()
        paths: dict[Path, Path | None] = {(): ()}
        for node, ranks in enumerate(tree.paths, 1):
            above = paths[ranks[:-1]]
            offered = [] if above is None else children(above)
            paths[ranks] = (*above, offered[ranks[-1]]) if above is not None and len(offered) > ranks[-1] else None
            assert tokens[node] == (-1 if paths[ranks] is None else paths[ranks][-1])


def follow(matches: list[tuple[int, list[int]]], confidence: tuple[float, ...]) -> Callable[[Path], list[int]]:
    """What may come after a path, best first."""

    def children(path: Path) -> list[int]:
        votes: dict[int, float] = {}
        for size, followers in matches:
            if tuple(followers[: len(path)]) == path:
                votes[followers[len(path)]] = votes.get(followers[len(path)], 0) + confidence[size - 1]
        return sorted(votes, key=lambda token: -votes[token])

    return children
