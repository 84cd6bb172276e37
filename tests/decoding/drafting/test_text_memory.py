"""Memory of texts: bounded, the oldest are forgotten, the same text is kept once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lin_jax.decoding import TextMemory
from lin_jax.decoding.drafting.suffix_index import build_index
from lin_jax.errors import UserError

LIMIT = 40


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=60), max_size=12))
def test_the_newest_texts_within_the_limit(added: list[list[int]]) -> None:
    """Against a list from which everything but the newest texts is struck out."""
    memory, kept = TextMemory(LIMIT), []
    for text in added:
        memory.add(text)
        if text:
            text = text[-(LIMIT - 1) :]
            kept = [old for old in kept if text[: len(old)] != old] + [text]
        while sum(len(each) + 1 for each in kept) > LIMIT:
            del kept[0]
        assert memory.texts == kept
        assert memory.size == sum(len(each) + 1 for each in kept) <= LIMIT
    memory.refresh()
    for found, expected in zip(memory.index.get_value(), build_index([*map(np.array, kept)], LIMIT), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_arrays_never_grow() -> None:
    memory = TextMemory(LIMIT)
    before = [part.shape for part in memory.index.get_value()]
    for number in range(50):
        memory.add([number] * 7)
    memory.refresh()
    assert [part.shape for part in memory.index.get_value()] == before
    assert memory.texts == [[number] * 7 for number in range(45, 50)]


def test_sorting_waits_for_enough() -> None:
    """A short text is not sorted in at once; many are, without being asked for."""
    memory = TextMemory(4096)
    memory.add([1, 2, 3])
    assert int(memory.index.get_value().filled) == 0
    for number in range(4, 520):
        memory.add([number, 1])
    assert int(memory.index.get_value().filled) > 200


@pytest.mark.parametrize("limit", [31, 2**25 + 1])
def test_impossible_limits(limit: int) -> None:
    with pytest.raises(UserError, match=f"a memory of {limit} tokens is not possible; give 32 to 33554432"):
        TextMemory(limit)
