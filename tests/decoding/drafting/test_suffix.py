"""Suffix drafter: the tree that it grows against votes counted in plain Python, and draft lengths by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.decoding import DraftTree, DynamicTree, LikeliestDrafter, NgramDrafter, SuffixDrafter, TextMemory, chain
from lin_jax.decoding.drafting.api import DraftContext, Drafter
from lin_jax.decoding.drafting.tree import AnyTree

DEPTH, LOOKBACK, ALL = 4, 64, 64
EARLIER = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 7], [0, 2, 3, 4, 5], [8, 8, 1, 2, 3, 4, 5, 9]]
TEXTS = [[1, 2, 3], [5, 1, 2, 3], [2, 3, 1, 2, 3, 1, 2, 3], [9], [7, 7, 7, 7], [6, 3]]
TREE = DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 0, 0)))


@pytest.fixture(scope="module")
def memory() -> TextMemory:
    memory = TextMemory(256)
    for text in EARLIER:
        memory.add(text)
    memory.refresh()
    return memory


def grow(drafter: Drafter, tree: AnyTree, texts: list[list[int]]) -> np.ndarray:
    recent = jnp.asarray([[-1] * (LOOKBACK - len(text)) + text for text in texts])
    context = DraftContext(recent[:, -1], jnp.zeros((len(texts), 1)), recent)
    state = drafter.init_state(len(texts), 0)
    return np.asarray(jax.jit(lambda each: tree.grow(each, context, state).tokens)(drafter))


def candidates(text: list[int], earlier: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Match lengths and followers of every occurrence of the last token, in the text and in earlier ones."""
    found = []
    for whole, own in [*((each, False) for each in earlier), (text, True)]:
        for end in range(len(whole) - 1):
            size = 0
            while size <= end and size < len(text) and whole[end - size] == text[-1 - size]:
                size += 1
            if size:
                copy = list(whole)
                if own:
                    for step in range(DEPTH):
                        copy.append(copy[end + 1 + step])
                found.append((size, copy[end + 1 : end + 1 + DEPTH]))
    return found


def estimates(
    found: list[tuple[int, list[int]]], path: list[int], growth: float, doubt: float, decay: float
) -> dict[int, float]:
    """Probability of each token after a path, as the drafter's documentation has it."""
    longest = max((size for size, _ in found), default=0)
    going = [(s, f[len(path)]) for s, f in found if f[: len(path)] == path and len(f) > len(path)]
    votes = {token: sum(growth ** (s - longest) for s, t in going if t == token) for _, token in going}
    right = 1 - doubt * decay ** (max((s for s, _ in going), default=0) + len(path) - 1)
    return {token: right * vote / sum(votes.values()) for token, vote in votes.items()}


@pytest.mark.parametrize("min_reach", [0.0, 0.2])
def test_votes(memory: TextMemory, min_reach: float) -> None:
    """At every node the likeliest tokens of all occurrences, as far down as they are likely enough to be reached."""
    options = {"growth": 3.0, "doubt": 0.6, "decay": 0.8}
    drafter = SuffixDrafter(memory, depth=DEPTH, matches=ALL // 2, lookback=LOOKBACK, min_reach=min_reach, **options)
    tokens = grow(drafter, TREE, TEXTS)
    dropped = 0
    for row, text in enumerate(TEXTS):
        found = candidates(text, EARLIER)
        made: dict[tuple[int, ...], tuple[list[int], float] | None] = {(): ([], 1.0)}
        for node, ranks in enumerate(TREE.paths, 1):
            above = made[ranks[:-1]]
            made[ranks] = None
            if above is None:
                assert tokens[row, node] == -1
                continue
            path, reach = above
            after = estimates(found, path, **options)
            offered = sorted((p for p in after.values() if reach * p >= min_reach), reverse=True)
            dropped += len(after) - len(offered)
            token = int(tokens[row, node])
            if len(offered) <= ranks[-1]:
                assert token == -1
                continue
            # Of equally likely tokens any order will do.
            assert round(after[token], 5) == round(offered[ranks[-1]], 5)
            made[ranks] = ([*path, token], reach * after[token])
    assert (dropped > 0) == (min_reach > 0)


def test_rows_draft_as_far_as_their_matches_promise(memory: TextMemory) -> None:
    options = {"growth": 2.0, "doubt": 0.65, "decay": 0.75, "min_reach": 0.3}
    drafter = SuffixDrafter(memory, depth=DEPTH, lookback=LOOKBACK, **options)
    lengths = (grow(drafter, chain(DEPTH), [[9], [0, 2], [8, 8, 1, 2], [1, 2, 3]]) >= 0).sum(axis=1) - 1
    assert lengths[0] == 0
    assert lengths[2] == DEPTH
    assert len(set(lengths.tolist())) > 2


def test_memory_is_seen_by_a_compiled_program() -> None:
    """A memory that grows is another argument of the same program."""
    memory, traced = TextMemory(256), []
    drafter = SuffixDrafter(memory, depth=DEPTH, lookback=LOOKBACK)
    recent = jnp.asarray([[-1] * (LOOKBACK - 2) + [1, 2]])

    @jax.jit
    def draft(each: Drafter) -> jax.Array:
        traced.append(1)
        return chain(2).grow(each, DraftContext(recent[:, -1], jnp.zeros((1, 1)), recent), None).tokens

    assert draft(drafter).tolist() == [[2, -1, -1]]
    memory.add([1, 2, 3, 4])
    memory.refresh()
    assert draft(drafter).tolist() == [[2, 3, 4]]
    assert len(traced) == 1


def test_the_likeliest_of_two(memory: TextMemory) -> None:
    """Long matches of the one win over short ones of the other; where one has nothing the other's guess is taken."""
    sure = SuffixDrafter(memory, depth=DEPTH, lookback=LOOKBACK)
    short = NgramDrafter(depth=DEPTH, matches=2, lookback=LOOKBACK, confidence=(0.4,))
    joined = LikeliestDrafter(short, sure)
    texts = [[4, 9, 8, 1, 2, 3, 4], [8, 6, 8], [9, 9, 0]]
    (longest, repeated, nothing) = grow(joined, chain(2), texts).tolist()
    assert longest == [4, 5, 9]
    assert repeated == [8, 6, 8]
    assert nothing == [0, 2, 3]
    alone = grow(short, chain(2), texts).tolist()
    assert alone == [[4, 9, 8], [8, 6, 8], [0, -1, -1]]
    for tree in (DraftTree(((0,), (1,), (2,), (0, 0))), DynamicTree(6, 2, 2, 3)):
        for row in grow(joined, tree, texts):
            children = [token for token in row[1:4].tolist() if token >= 0]
            assert len(set(children)) == len(children)
