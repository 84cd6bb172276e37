"""Slots, stops, streams, prefixes: what surrounds the loop, in float64 against plain decoding of each prompt alone."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from support.samples import NEW, TREE, VOCABULARY, KnowingDrafter, build_model, padded

from lin_jax.decoding import Generator, NgramDrafter, Sampling, chain
from lin_jax.decoding.engine.decode_loop import run, start
from lin_jax.decoding.engine.prefill import chunk_sizes, prefill_chunk
from lin_jax.decoding.engine.slots import insert_rows
from lin_jax.decoding.engine.stop_strings import stop_automaton
from lin_jax.models import Llama

pytestmark = pytest.mark.usefixtures("x64")
SAMPLED = Sampling(0.9, top_p=0.95)
# Every token is a letter, so that texts can be searched in plain Python.
LETTERS = [bytes([97 + token % 26]) for token in range(VOCABULARY)]


@pytest.fixture(scope="module")
def model() -> Llama:
    with jax.enable_x64(True):
        return build_model()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCABULARY, n).tolist() for n in (3, 11, 1, 8, 20, 9, 15)]


@pytest.fixture(scope="module")
def free(model: Llama, prompts: list[list[int]]) -> list[list[int]]:
    """What plain decoding writes."""
    with jax.enable_x64(True):
        return Generator(model, prefill_chunk_size=32).generate(prompts, NEW).tokens


@pytest.mark.thorough
def test_stops_inside_an_accepted_run(model: Llama, prompts: list[list[int]], free: list[list[int]]) -> None:
    """An end token, a stop string or the limit cuts an accepted run, row by row, and frees the slot for the next."""
    ends = (free[0][5], free[3][9])
    text = ["".join(LETTERS[token].decode() for token in row) for row in free]
    stops = (text[1][10:13], text[4][2:4])

    def expected(row: int, limit: int) -> tuple[list[int], str]:
        found = [(free[row].index(end) + 1, "end token") for end in ends if end in free[row]]
        found += [(text[row].find(stop) + len(stop), "stop string") for stop in stops if stop in text[row]]
        count, ending = min(found, default=(limit, "length"))
        return (free[row][:count], ending) if count <= limit else (free[row][:limit], "length")

    automaton = stop_automaton(stops, LETTERS)
    for right in (0.0, 0.7, 1.0):
        drafter = KnowingDrafter(padded(prompts, free), 7, right)
        generator = Generator(
            model, drafter=drafter, tree=TREE, end_tokens=ends, stops=automaton, prefill_chunk_size=32
        )
        for limit in (NEW, 3):
            found = generator.generate(prompts, limit, slots=2)
            for row in range(len(prompts)):
                assert (found.tokens[row], found.endings[row]) == expected(row, limit)
    assert len({expected(row, limit)[1] for row in range(len(prompts)) for limit in (NEW, 3)}) == 3


@pytest.mark.thorough
def test_slots_and_prompts_share_compiled_programs(model: Llama, prompts: list[list[int]]) -> None:
    """Neither lengths of prompts, nor how many wait, nor how full the batch is, nor which prepared tree is used."""
    programs = (run, start, prefill_chunk, insert_rows)
    generator = Generator(
        model, drafter=NgramDrafter(depth=3, lookback=32), tree={1: chain(2), 2: chain(3)}, prefill_chunk_size=32
    )

    def everything() -> None:
        for slots in (1, 2):
            generator.generate(prompts, 9, slots=slots)

    everything()
    before = [program._cache_size() for program in programs]
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    everything()
    assert not compiled
    for count, slots in ((1, 2), (2, 2), (7, 2), (3, 1)):
        generator.generate([[1] * (5 + 6 * row) for row in range(count)], 7, slots=slots)
    generator.generate([[2] * 99], 9, slots=1)
    assert [program._cache_size() for program in programs] == before


def test_streams_are_what_is_generated(model: Llama, prompts: list[list[int]], free: list[list[int]]) -> None:
    generator = Generator(model, drafter=NgramDrafter(depth=3, lookback=32), prefill_chunk_size=32)
    stream = generator.stream(prompts, NEW, slots=2, steps_per_sync=3)
    rows: list[list[int]] = [[] for _ in prompts]
    running, most = set(), 0
    for update in stream:
        assert update.tokens or update.finished
        running = (running | {update.row}) - ({update.row} if update.finished else set())
        most = max(most, len(running))
        rows[update.row] += update.tokens
    whole = generator.generate(prompts, NEW, slots=2)
    assert rows == free == whole.tokens == stream.generation.tokens
    assert stream.generation.origins == whole.origins
    assert stream.generation.steps == whole.steps
    assert stream.generation.accepted_histogram.tolist() == whole.accepted_histogram.tolist()
    assert most == 2
    assert stream.finished


def test_a_stream_can_be_left(model: Llama, prompts: list[list[int]], free: list[list[int]]) -> None:
    """What has come by then is there, as after Ctrl-C."""
    stream = Generator(model, prefill_chunk_size=32).stream(prompts, NEW, slots=2, steps_per_sync=4)
    for number, _ in enumerate(stream):
        if number == 3:
            break
    found = stream.generation
    assert found.tokens[:2] == [free[0][:5], free[1][:5]]
    assert found.tokens[2:] == [[]] * 5
    assert found.endings == ["running"] * 2 + ["waiting"] * 5
    assert found.decoded == 8


@pytest.mark.thorough
def test_state_size_does_not_grow(model: Llama) -> None:
    generator = Generator(model, prefill_chunk_size=32)
    assert generator.generate([[1] * 3], 2).state_bytes == generator.generate([[1] * 300], 2).state_bytes
    softmax = Generator(build_model("softmax"), prefill_chunk_size=32)
    assert softmax.generate([[1] * 3], 2).state_bytes < softmax.generate([[1] * 300], 2).state_bytes


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 100, 256, 1000])
def test_pieces_cover_a_text(length: int) -> None:
    found = list(chunk_sizes(length, 256))
    assert found[0][0] == 0
    assert all(begin + size == after for (begin, size), (after, _) in pairwise(found))
    assert sum(size for _, size in found) >= length > found[-1][0]
    assert {size for _, size in found} <= {32, 64, 128, 256}
