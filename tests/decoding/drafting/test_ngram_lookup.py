"""Prompt lookup against a search in plain Python, and the trie that it grows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.decoding import DraftTree, NgramDrafter
from lin_jax.decoding.drafting.api import DraftContext
from lin_jax.decoding.drafting.ngram_lookup import (
    LONGEST_ALERT,
    LOOKED_UP,
    MatchWatch,
    find_matches,
    longest_match,
)

Path = tuple[int, ...]


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
    draft = jax.jit(lambda: tree.grow(drafter, begun, None))()
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


def test_the_longest_match_is_that_of_a_search() -> None:
    """Of texts of few letters, and of some shorter than the buffer; -1 stands before their beginning."""
    rng = np.random.default_rng(4)
    texts = [rng.integers(0, 3, 40).tolist() for _ in range(6)] + [[7] * 12, [1, 2], [5], [1, 2, 3] * 13]
    recent = np.array([[-1] * (40 - len(text)) + text for text in texts], np.int32)

    def slow(text: list[int]) -> int:
        ends = range(1, len(text))
        sizes = [next(n for n in range(9) if n == min(end, 8) or text[end - 1 - n] != text[-1 - n]) for end in ends]
        return max(sizes, default=0)

    def looked_up(text: list[int]) -> int:
        for size in (3, 2, 1):
            ends = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
            if ends:
                return next(n for n in range(9) if n == min(ends[-1], 8) or text[ends[-1] - 1 - n] != text[-1 - n])
        return 0

    assert longest_match(jnp.asarray(recent), 8).tolist() == [slow(text) for text in texts]
    assert longest_match(jnp.asarray(recent), 8, 3).tolist() == [looked_up(text) for text in texts]


def test_a_watch_finds_what_a_new_search_would() -> None:
    """Token by token, beginning inside of texts that repeat themselves by chance, or go round in circles."""
    rng, width, begin = np.random.default_rng(0), 120, 60
    texts = [rng.integers(0, 3, 100) for _ in range(3)] + [np.tile(rng.integers(0, 9, 13), 9)[:100]]
    ended = np.array([[-1] * (width - begin) + text[:begin].tolist() for text in texts], np.int32)
    watch = MatchWatch.begin(jnp.asarray(ended), 40, jnp.asarray(True))
    follow, search = jax.jit(MatchWatch.follow), jax.jit(lambda recent: longest_match(recent, LONGEST_ALERT, LOOKED_UP))
    seen = set()
    for count in range(40):
        token = np.array([text[begin + count] for text in texts], np.int32)
        ended = np.concatenate([ended[:, 1:], token[:, None]], axis=1)
        watch = follow(watch, jnp.asarray(count, jnp.int32), jnp.asarray(token))
        found = watch.found.tolist()
        assert found == search(jnp.asarray(ended)).tolist()
        seen |= set(found)
    assert LONGEST_ALERT in seen
    assert len(seen) > 4
