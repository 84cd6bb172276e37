"""Search of the sorted contexts against a comparison with every place of the texts, in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lin_jax.decoding.drafting.suffix_index import MAX_MATCH, build_index, search, sorted_places

CAPACITY, WIDTH, DEPTH, COUNT = 192, 48, 3, 4
# One program for all examples.
SEARCH = jax.jit(lambda index, recent: search(index, recent, DEPTH, COUNT))

small = st.integers(1, 3).flatmap(lambda last: st.lists(st.integers(0, last), min_size=1, max_size=40))
periods = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=3), st.integers(2, 16))
repeating = periods.map(lambda one: (one[0] * one[1])[:45])
texts = st.lists(small | repeating, max_size=4)


def occurrences(known: list[list[int]], end: list[int]) -> list[tuple[int, list[int]]]:
    """Sizes of all matches, and what follows each, best first: the longest, and of equals the latest."""
    found = []
    for number, text in enumerate(known):
        for place in range(len(text) - 1):
            size = 0
            while size < min(MAX_MATCH, place + 1, len(end)) and text[place - size] == end[-1 - size]:
                size += 1
            if size:
                followers = text[place + 1 : place + 1 + DEPTH]
                found.append((size, (number, place), [*followers, *[-1] * (DEPTH - len(followers))]))
    found.sort(key=lambda one: (one[0], one[1]), reverse=True)
    return [(size, followers) for size, _, followers in found]


def search_for(known: list[list[int]], ends: list[list[int]]) -> list[list[tuple[int, list[int]]]]:
    """What the search finds for each end."""
    index = build_index([np.array(text, np.int32) for text in known], CAPACITY)
    recent = np.full((2, WIDTH), -1, np.int32)
    for row, end in zip(recent, ends, strict=True):
        row[WIDTH - len(end) :] = end
    found = SEARCH(index, jnp.asarray(recent))
    rows = zip(found.sizes.tolist(), found.followers.tolist(), strict=True)
    return [[(size, after) for size, after in zip(*row, strict=True) if size] for row in rows]


@settings(max_examples=300, deadline=None)
@example([], [[1], [2]])
@example([[1]], [[1], [1, 1]])
@example([[0, 1] * 20, [1, 0] * 20], [[0, 1] * 20, [1] * 40])
@given(texts, st.lists(small | repeating, min_size=2, max_size=2))
def test_finds_the_longest_matches(known: list[list[int]], ends: list[list[int]]) -> None:
    """The longest matches there are, every one real; and all of the longest, where there are no more than asked for."""
    for found, end in zip(search_for(known, ends), ends, strict=True):
        expected = occurrences(known, end)
        assert [size for size, _ in found] == [size for size, _ in expected[:COUNT]]
        left = list(expected)
        for one in found:
            left.remove(one)
        longest = [one for one in expected if one[0] == expected[0][0]]
        if len(longest) <= COUNT:
            assert found[: len(longest)] == longest


@settings(max_examples=200, deadline=None)
@given(texts)
def test_order_of_contexts(known: list[list[int]]) -> None:
    """Places by their contexts read backwards, of equal contexts the latest first, against Python's own sorting."""
    tokens = [-1] * MAX_MATCH
    for text in known:
        tokens += [*text, -1]
    places = [i for i in range(len(tokens) - 1) if tokens[i] >= 0 and tokens[i + 1] >= 0]
    expected = sorted(places, key=lambda i: (tokens[i - MAX_MATCH + 1 : i + 1][::-1], -i))
    assert sorted_places(np.array(tokens, np.int32)).tolist() == expected


def test_a_match_ends_with_its_text() -> None:
    """Neither a match nor what follows it reaches over the end of a text into the next."""
    assert search_for([[1, 2, 3], [4, 5, 6]], [[3, 4], [9, 2]]) == [[(1, [5, 6, -1])], [(1, [3, -1, -1])]]
