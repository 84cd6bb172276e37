"""Stop strings found among tokens, against a search in the text of the tokens."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lin_jax.data import Tokenizer
from lin_jax.data.tokenizers.token_bytes import token_bytes
from lin_jax.decoding.engine.stop_strings import StopAutomaton, check_stops, first_stop_in, stop_automaton
from lin_jax.errors import UserError

find = jax.jit(StopAutomaton.find)

# Bytes of one, two and three to a character, some of them shared: é is C3 A9, ã C3 A3, 日 E6 97 A5, 旧 E6 97 A7.
TEXTS = st.text(st.sampled_from("ab\néã日旧"), min_size=1, max_size=5)
PIECES = st.lists(
    st.one_of(
        TEXTS.map(str.encode),
        st.sampled_from([b"", b"a", b"\xc3", b"\xa9", b"\xe6", b"\x97", b"\xa5"]),
        st.binary(min_size=1, max_size=2),
    ),
    min_size=1,
    max_size=12,
)


def first_stop(stops: Sequence[str], pieces: Sequence[bytes], before: bytes, tokens: Sequence[int]) -> int:
    """Index of the first token after which one of the stop strings has ended inside the new text."""
    text = before
    for index, token in enumerate(tokens):
        start, text = len(text), text + pieces[token]
        for stop in map(str.encode, stops):
            if stop in text[max(start - len(stop) + 1, 0) :]:
                return index
    return len(tokens)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_finds_what_a_search_finds(data: st.DataObject) -> None:
    stops = data.draw(st.lists(TEXTS, max_size=4))
    pieces = data.draw(PIECES)
    token = st.integers(0, len(pieces) - 1)
    automaton = stop_automaton(stops, pieces)
    assert automaton.following.dtype == jnp.int16
    assert automaton.following.shape == (len(automaton.completes), len(pieces))
    assert automaton.following.shape[0] % 16 == 0

    # Rows of text, read six tokens at a time, of which some count.
    rows = 5
    state, before = jnp.zeros(rows, jnp.int32), [b""] * rows
    for _ in range(3):
        tokens = np.array(data.draw(st.lists(st.lists(token, min_size=6, max_size=6), min_size=rows, max_size=rows)))
        length = np.array(data.draw(st.lists(st.integers(0, 6), min_size=rows, max_size=rows)))
        first, state = find(automaton, state, jnp.asarray(tokens), jnp.asarray(length))
        for row in range(rows):
            counted = tokens[row, : length[row]].tolist()
            index = first_stop(stops, pieces, before[row], counted)
            assert int(first[row]) == (index if index < len(counted) else 6)
            before[row] += b"".join(pieces[number] for number in counted[: index + 1])


def test_overlapping_stops_and_several_in_a_token() -> None:
    stops = ["abcd", "bc", "c", "cde", "é"]
    pieces = [b"ab", b"cd", b"d", b"e", b"\xc3", b"\xa9", b"xabcdcdey", b""]
    automaton = stop_automaton(stops, pieces)
    tokens = jnp.asarray([[0, 7, 1, 2], [0, 2, 3, 4], [4, 7, 5, 0], [6, 6, 6, 6], [2, 3, 0, 2], [-1, 99, 0, 1]])
    first, state = find(automaton, jnp.zeros(6, jnp.int32), tokens, jnp.asarray([4, 4, 4, 4, 3, 4]))
    assert first.tolist() == [2, 4, 2, 0, 4, 3]
    # Row 1 stands inside the character, row 4 inside "ab".
    again, _ = find(automaton, state, jnp.asarray([[7], [5], [7], [7], [1], [7]]), jnp.ones(6, jnp.int32))
    assert again.tolist() == [1, 0, 1, 1, 0, 1]


def test_real_vocabulary() -> None:
    text = Path(__file__).read_text()
    tokenizer = Tokenizer.train([text, "日本語 é"], 500)
    ids = tokenizer.encode(text)
    pieces = token_bytes(tokenizer)
    for stops in (["日本語"], ["automaton.find", "\n\n\n"], ["def test_", "é 日"], ["nothing" + " like it"]):
        first, _ = find(
            stop_automaton(stops, pieces), jnp.zeros(1, jnp.int32), jnp.asarray(ids)[None], jnp.asarray([len(ids)])
        )
        assert int(first[0]) == first_stop(stops, pieces, b"", ids.tolist())
        through = tokenizer.decode(ids[: int(first[0]) + 1])
        assert first_stop_in(through, stops) == first_stop_in(text, stops)


def test_no_stops_find_nothing() -> None:
    automaton = stop_automaton([], [b"a", b"b"])
    first, state = find(automaton, jnp.zeros(1, jnp.int32), jnp.asarray([[0, 1]]), jnp.asarray([2]))
    assert (first.tolist(), state.tolist()) == ([2], [0])


@given(text=st.text(st.sampled_from("abc")), stops=st.lists(st.text(st.sampled_from("abc"), min_size=1)))
def test_first_of_several(text: str, stops: list[str]) -> None:
    starts = [start for start in range(len(text)) if any(text.startswith(stop, start) for stop in stops)]
    assert first_stop_in(text, stops) == (starts[0] if starts else None)


@pytest.mark.parametrize(("stop", "message"), [("", "empty"), ("a\ud800", "not valid Unicode")])
def test_bad_stops(stop: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stop_automaton(["x", stop], [b"a"])
    with pytest.raises(UserError, match=message):
        check_stops([stop])
