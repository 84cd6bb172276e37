"""Lookups in hindsight against a slow copy of the definition, and against the drafter on the device."""

import numpy as np
import pytest
from support.samples import VOCABULARY, build_model

from lin_jax.decoding import Generator, NgramDrafter, SuffixDrafter, TextMemory, chain
from lin_jax.decoding.drafting.hindsight import LookupHindsight, MemoryHindsight
from lin_jax.decoding.drafting.suffix_index import MAX_MATCH
from lin_jax.decoding.drafting.text_memory import LONG


def slow(text: list[int], depth: int, longest: int, lookback: int) -> list[int]:
    """Accepted guesses of every step that is complete, by a search through the whole text at each step."""
    found, place = [], 0
    while place < len(text):
        known, guesses = text[: place + 1], []
        for size in range(min(longest, len(known)), 0, -1):
            ends = [end for end in range(size - 1, place) if known[end - size + 1 : end + 1] == known[-size:]]
            if ends and place - ends[-1] < lookback:
                period = place - ends[-1]
                guesses = [known[ends[-1] + 1 + number % period] for number in range(depth)]
                break
        accepted = 0
        while accepted < len(guesses) and text[place + 1 + accepted : place + 2 + accepted] == [guesses[accepted]]:
            accepted += 1
        if place + 1 + accepted >= len(text):
            break
        found.append(accepted)
        place += accepted + 1
    return found


@pytest.mark.parametrize("letters", [2, 5, 40])
def test_steps_are_those_of_the_definition(letters: int) -> None:
    rng = np.random.default_rng(letters)
    text = rng.integers(0, letters, 90).tolist() * 3
    for depth, longest in ((1, 1), (7, 3)):
        hindsight = LookupHindsight(depth, longest, 1000)
        pieces = [text[begin : begin + 17] for begin in range(0, len(text), 17)]
        assert [each for piece in pieces for each in hindsight.push(piece)] == slow(text, depth, longest, 1000)


def test_trials_tell_how_long_the_match_was() -> None:
    """For every copied token: the tokens before it that agree with those before the place that it is copied from."""
    text = np.random.default_rng(1).integers(0, 3, 200).tolist()
    hindsight = LookupHindsight(7, 3, 1000)
    places, right = [], []
    for place, token in enumerate(text):
        matched = hindsight.matched
        hindsight.push([token])
        for trial in hindsight.trials:
            places.append(place)
            right.append(trial.right)
            assert trial.matched == matched
            ends = [end for end in range(1, place) if text[end] == token or not trial.right]
            agreeing = [
                next((k for k in range(MAX_MATCH + 9) if k >= end or text[end - 1 - k] != text[place - 1 - k]), 0)
                for end in ends
            ]
            # Some earlier place agrees as long, and goes on as was guessed.
            assert not trial.right or max(agreeing) >= min(matched, MAX_MATCH)
    assert 0 < sum(right) < len(right)
    assert len(places) > 100


def test_memory_is_bounded() -> None:
    hindsight = LookupHindsight(7, 3, 50)
    for _ in range(100):
        hindsight.push(np.random.default_rng(0).integers(0, 9, 40).tolist())
        assert len(hindsight.text) <= 100
        assert len(hindsight.ends) <= 300


def test_it_foretells_what_the_drafter_gives() -> None:
    """On a text that goes round in circles, as greedy ones of random models do."""
    model = build_model("augmented", dtype="float32")
    drafter = NgramDrafter(depth=7, lookback=256)
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, 12).tolist()
    done = Generator(model, drafter=drafter, tree=chain(7)).generate([prompt], 120)
    hindsight = drafter.hindsight(7)
    hindsight.push([*prompt, done.tokens[0][0]])
    foretold = np.bincount(hindsight.push(done.tokens[0][1:]), minlength=8)
    assert np.abs(foretold - done.accepted_histogram).sum() <= 3


def test_earlier_texts_are_followed_to_their_end() -> None:
    """The longest known passage goes on, whatever shorter contexts came later; beyond it nothing is guessed."""
    rng, memory = np.random.default_rng(3), TextMemory(512)
    first, second = rng.integers(0, 40, 60).tolist(), rng.integers(0, 40, 60).tolist()
    second[20:23] = first[30:33]
    for text in (first, second):
        memory.add(text)
    new = rng.integers(40, 50, 10).tolist()
    hindsight = MemoryHindsight(7, memory, 0, 256)
    assert not any(hindsight.push([*new, *first]))
    memory.refresh()
    hindsight = MemoryHindsight(7, memory, 0, 256)
    accepted = hindsight.push([*new, *first, *new])
    # Three tokens are read before the passage is known; the last step in it has one left to guess.
    assert accepted == [0] * 12 + [7] * 7 + [1] + [0] * 9
    # Every copied token of the passage tells how long the match before it was, the first one of an earlier text.
    assert [each.matched for each in hindsight.trials][:4] == [3, 4, 5, 6]
    assert all(each.right for each in hindsight.trials)
    assert hindsight.matched == 0


def test_a_known_beginning_is_followed_at_once() -> None:
    """A text so far that an earlier one began with, however short; and only as long as they agree."""
    text, memory = np.random.default_rng(5).integers(0, 40, 60).tolist(), TextMemory(512)
    memory.add(text)
    memory.refresh()
    hindsight = MemoryHindsight(7, memory, 0, 256)
    hindsight.push(text[:2])
    assert hindsight.matched >= LONG
    assert hindsight.push(text[2:20]) == [7, 7]
    assert hindsight.matched >= LONG
    hindsight.push([99])
    assert not hindsight.matched
    # Texts that come later are found without listing the earlier ones anew.
    listed = memory.contexts.tokens
    memory.add([*text[:20], 99, *range(100, 140)])
    memory.refresh()
    assert memory.contexts.tokens is listed
    hindsight = MemoryHindsight(7, memory, 0, 256)
    hindsight.push([50, *text[:20], 99, 100])
    assert hindsight.matched >= LONG
    assert hindsight.guesses[hindsight.accepted :][:2] == [101, 102]


def test_a_passage_is_followed_however_much_comes_at_a_time() -> None:
    """More tokens than the drafter looks at: all of them were copied, and the match is as long as that."""
    text, memory = np.random.default_rng(6).integers(0, 40, 300).tolist(), TextMemory(512)
    memory.add(text)
    memory.refresh()
    hindsight = MemoryHindsight(31, memory, 0, MAX_MATCH)
    hindsight.push(text[:20])
    hindsight.push(text[20:200])
    assert all(each.right for each in hindsight.trials)
    assert hindsight.matched >= 180
    assert hindsight.guesses[hindsight.accepted] == text[200]


@pytest.mark.thorough
def test_it_foretells_what_the_suffix_drafter_gives() -> None:
    model, memory = build_model("augmented", dtype="float32"), TextMemory(1024)
    prompts = [np.random.default_rng(seed).integers(0, VOCABULARY, 12).tolist() for seed in (1, 2)]
    generator = Generator(model, drafter=SuffixDrafter(memory, lookback=64), tree=chain(7), memory=memory)
    for _ in range(2):
        done = generator.generate(prompts, 120)
    hindsight = MemoryHindsight(7, memory, 0, 256)
    hindsight.push([*prompts[1], done.tokens[1][0]])
    steps = len(hindsight.push(done.tokens[1][1:]))
    assert abs(steps - done.steps[1]) <= 2 < 30 < 120 / 2
