"""The choice among draft shapes on simulated texts: it finds what pays, and what it may lose is bounded."""

from collections.abc import Callable

import numpy as np
import pytest

from lin_jax.decoding.autotune.account import ALLOWANCE, LARGEST_GAIN, RATE
from lin_jax.decoding.autotune.choice import Arm, Choice
from lin_jax.decoding.autotune.chooser import FIRST_PAUSE, Chooser
from lin_jax.decoding.autotune.evidence import Evidence, evidence_shape

# Plain decoding, chains of 1, 3 and 7 guesses of one drafter, and a tree 4 deep of another.
ARMS = (Arm(0, 0), Arm(0, 1), Arm(0, 3), Arm(0, 7), Arm(1, 4))
AVX2, AVX512, GPU = (1.0, 1.85, 2.15, 2.45, 2.6), (1.0, 1.3, 1.4, 1.6, 1.7), (1.0, 1.02, 1.05, 1.1, 1.12)
READY = range(1, len(ARMS))
# Probability that the guess of a depth is right, given family, place in the text and depth from 1.
Truth = Callable[[int, int, int], float]


class Text:
    """Text whose tokens are easy or hard to guess, the same whatever is done."""

    def __init__(self, truth: Truth, length: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.right = np.array(
            [[[rng.random() < truth(f, place, d) for d in range(1, 8)] for place in range(length)] for f in (0, 1)]
        )

    def accepted(self, family: int, place: int, depth: int) -> int:
        """Accepted guesses of a step that begins at a place."""
        return int(np.cumprod(self.right[family, min(place, self.right.shape[1] - 1), :depth]).sum())


def decode(
    text: Text, costs: tuple[float, ...], tokens: int, *, rows: int = 1, learned: Evidence | None = None
) -> tuple[float, list[Choice], Chooser]:
    """Plain steps that decoding takes, and what was chosen; as the loop does it, it leaves an arm that could lose."""
    chooser = Chooser(ARMS, costs.__getitem__, rows, learned=learned, visit_cost=0.1)
    place, spent, choices = np.zeros(rows, int), 0.0, []
    while place.min() < tokens:
        choice = chooser.choose(np.ones(rows, bool), READY, 128)
        arm, lost, steps = ARMS[choice.arm], 0.0, 0
        histogram = np.zeros((rows, 8), int)
        while steps < choice.steps and place.min() < tokens:
            if choice.arm and lost + choice.cost - 1 > choice.allowance:
                break
            given = np.array([1 + text.accepted(arm.family, int(p), arm.depth) for p in place])
            place += given
            histogram[np.arange(rows), given - 1] += 1
            lost += choice.cost - given.mean()
            steps += 1
        spent += steps * costs[choice.arm] + (0.1 if choice.arm else 0)
        choices.append(choice)
        chooser.update(choice, steps, histogram)
    return spent / place.mean(), choices, chooser


def never(family: int, place: int, depth: int) -> float:
    return 0.0


def at_first(family: int, place: int, depth: int) -> float:
    return 1.0 if place < 40 else 0.0


def in_turns(family: int, place: int, depth: int) -> float:
    return float(place // 12 % 2)


def just_not(family: int, place: int, depth: int) -> float:
    return 0.55


@pytest.mark.parametrize("costs", [AVX2, AVX512, GPU], ids=["avx2", "avx512", "gpu"])
@pytest.mark.parametrize("truth", [never, at_first, in_turns, just_not])
def test_regret_is_bounded_whatever_the_text(truth: Truth, costs: tuple[float, ...]) -> None:
    for seed in range(5):
        for tokens in (200, 1000):
            spent, _, _ = decode(Text(truth, tokens + 8, seed), costs, tokens)
            assert spent <= 1 + RATE + ALLOWANCE / tokens + 1e-9
            assert 1 / spent >= 0.97


@pytest.mark.parametrize(
    ("share", "costs", "best"),
    [
        *(
            (0.9, AVX512, 3),
            (0.9, AVX2, 3),
            (0.8, GPU, 3),
            (0.5, (1, 1.2, 1.3, 3, 9), 2),
            (0.6, (1, 1.1, 2.5, 4, 9), 1),
        ),
        *((0.2, AVX512, 0), (0.5, AVX2, 0)),
    ],
)
def test_it_settles_on_the_best_length(share: float, costs: tuple[float, ...], best: int) -> None:
    """Only the first family's guesses are ever right; of its lengths the best is taken for most of a long text."""
    text = Text(lambda family, place, depth: share if family == 0 else 0.0, 4008)
    spent, choices, _ = decode(text, costs, 4000)
    late = [choice.arm for choice in choices[len(choices) // 2 :] for _ in range(choice.steps)]
    assert np.bincount(late).argmax() == best
    alone = [(1 + sum(share**d for d in range(1, arm.depth + 1))) / cost for arm, cost in zip(ARMS, costs, strict=True)]
    assert int(np.argmax(alone[:4])) == best
    assert 1 / spent >= 0.9 * max(alone[:4])


def test_what_loses_is_tried_again_seldom_and_found_when_it_pays() -> None:
    """A text that cannot be guessed for 2,000 tokens, and then can."""
    text = Text(lambda family, place, depth: 0.95 * (place > 2000), 6008)
    _, choices, _ = decode(text, AVX512, 6000)
    place, trials, drafted = 0, [], 0
    for choice in choices:
        if choice.arm and ARMS[choice.arm].family == 0:
            trials += [place] if place < 2000 else []
            drafted += choice.steps
        place += choice.steps
    assert trials[0] == 0
    assert 2 <= len(trials) <= 12
    assert np.diff(trials).min() >= FIRST_PAUSE
    # Half of what is left after the longest pause, at six tokens a step.
    assert drafted > 250


def test_the_same_counts_make_the_same_choices() -> None:
    text = Text(just_not, 1008, 3)
    assert decode(text, AVX512, 1000)[1] == decode(text, AVX512, 1000)[1]


def test_earlier_texts_teach() -> None:
    """After a text that was easy to guess, the next one is drafted for from its first step on, at full length."""
    text = Text(lambda family, place, depth: 0.9, 408)
    learned = Evidence.none(1, *evidence_shape(ARMS))
    decode(text, AVX512, 400, learned=learned)
    again = Chooser(ARMS, AVX512.__getitem__, 1, learned=learned)
    assert again.values(np.ones(1, bool))[3] > 2
    assert again.choose(np.ones(1, bool), READY, 128).arm == 3


def test_rows_are_told_apart() -> None:
    """The mean over the rows that run decides; a row that another text takes begins anew."""
    chooser = Chooser(ARMS, AVX2.__getitem__, 2, observed=frozenset({0, 1}))
    for _ in range(20):
        chooser.observe(0, 0, np.array([0, 0, 0, 0, 0, 0, 0, 1]))
        chooser.observe(1, 0, np.array([1, 0, 0, 0, 0, 0, 0, 0]))
    first, second = np.array([True, False]), np.array([False, True])
    assert chooser.choose(first, READY, 16).arm == 3
    assert chooser.choose(second, READY, 16).arm == 0
    both = chooser.values(first | second)[3]
    assert both == pytest.approx((chooser.values(first)[3] + chooser.values(second)[3]) / 2)
    chooser.begin_row(0)
    assert chooser.values(first)[3] < both * 1.1


def test_what_is_observed_is_not_tried_in_vain() -> None:
    """Where evidence costs nothing, nothing is spent before it speaks for drafts."""
    chooser = Chooser(ARMS, AVX512.__getitem__, 1, observed=frozenset({0, 1}))
    running = np.ones(1, bool)
    assert chooser.choose(running, READY, 128).arm == 0
    assert chooser.wanted(running, ()) is None
    for _ in range(30):
        chooser.observe(0, 0, np.array([1, 0, 0, 3, 0, 0, 0, 2]))
    assert chooser.wanted(running, ()) == 3
    assert chooser.choose(running, (1,), 128).arm != 3
    assert chooser.choose(running, READY, 128).arm == 3


def test_what_is_missing_is_compiled_in_the_order_of_its_promise() -> None:
    chooser = Chooser(ARMS, AVX512.__getitem__, 1)
    running = np.ones(1, bool)
    assert chooser.wanted(running, ()) == 3
    assert chooser.choose(running, (), 128) == chooser.choose(running, (1,), 128)
    assert chooser.choose(running, (3,), 128).arm == 3


def test_where_no_prompts_wait_the_row_that_takes_longest_decides() -> None:
    """Drafts that are right in some rows gain nothing by them, unless others are about to be done, or prompts wait."""
    running, chooser = np.ones(4, bool), Chooser(ARMS, AVX2.__getitem__, 4, observed=frozenset({0, 1}))
    for _ in range(20):
        for row in range(4):
            chooser.observe(row, 0, np.array([0, 0, 0, 0, 0, 0, 0, 1]) if row else np.array([1, 0, 0, 0, 0, 0, 0, 0]))
    assert chooser.choose(running, READY, 16).arm == 3
    assert chooser.choose(running, READY, 16, np.array([100] * 4)).arm == 0
    assert chooser.choose(running, READY, 16, np.array([10, 100, 100, 100])).arm == 3
    # The account sees it: eight tokens a step for three rows, and one for the row that is waited for.
    before = chooser.balance
    choice = chooser.choose(running, READY, 16, np.array([50, 100, 100, 100]))
    histogram = np.zeros((4, 8), int)
    histogram[0, 0] = histogram[1:, 7] = 10
    chooser.update(choice, 10, histogram)
    # 100 tokens were left, and 40 are: 60 plain steps.
    assert chooser.balance - before == pytest.approx(min(60 * (1 + RATE) - 10 * AVX2[3], LARGEST_GAIN + 60 * RATE))
    choice = chooser.choose(running, READY, 16, np.array([40, 20, 20, 20]))
    before = chooser.balance
    chooser.update(choice, 10, histogram)
    gained = 10 - (10 * AVX2[choice.arm] if choice.arm else 10)
    assert chooser.balance - before == pytest.approx(gained + 10 * RATE)
