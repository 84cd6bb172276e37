"""The choice of copies by the length of their match, on simulated texts that repeat themselves, or only seem to."""

from collections.abc import Callable

import numpy as np
import pytest

from lin_jax.decoding.autotune.account import ALLOWANCE, CREDIT, RATE
from lin_jax.decoding.autotune.choice import NO_ALERT, Arm, Choice
from lin_jax.decoding.autotune.chooser import ARM_STEPS, MIN_GAIN, Chooser
from lin_jax.decoding.autotune.evidence import MATCHES, Evidence, evidence_shape
from lin_jax.decoding.drafting.hindsight import LookupHindsight

# Plain decoding, chains of 1, 3 and 7 guesses of heads that are never right, and copies in chains of 3 to 31.
ARMS = (Arm(0, 0), Arm(0, 1), Arm(0, 3), Arm(0, 7), Arm(1, 3), Arm(1, 7), Arm(1, 15), Arm(1, 31))
COSTS = {
    "avx512": (1.0, 1.3, 1.5, 1.8, 1.5, 1.8, 2.4, 3.6),
    "avx2": (1.0, 1.85, 2.15, 2.45, 2.15, 2.45, 3.4, 5.5),
    # What was measured with a model of a few layers and a window: a draft of any length costs more than two steps.
    "small": (1.0, 2.4, 2.9, 3.3, 2.9, 3.2, 4.5, 7.0),
}
VISIT, COPIES, SWITCHING = 0.2, frozenset({1}), (4, 5, 6, 7)
Text = Callable[[np.random.Generator, int], list[int]]


def decode(
    text: list[int], costs: tuple[float, ...], learned: Evidence | None = None, *, watched: bool = False
) -> tuple[float, list[int]]:
    """Plain steps that a token takes, syncs with the host included, and the arm of every step.

    Where it is watched for matches, the loop of copies takes plain steps between them; else the host looks for each.
    """
    switches = {"alerting": COPIES, "switching": SWITCHING} if watched else {}
    chooser = Chooser(ARMS, costs.__getitem__, 1, copies=COPIES, learned=learned, visit_cost=VISIT, **switches)
    hindsight, place, spent, arms = LookupHindsight(31, 3, 2048), 0, 0.0, []
    hindsight.push(text[:1])
    while place < len(text) - 1:
        choice = chooser.choose(np.ones(1, bool), range(1, len(ARMS)), 128)
        begin, loop = place, Loop(text, place, choice, watched=watched)
        place = loop.place
        drafted = sum(map(bool, loop.arms))
        given = place - begin if watched else len(loop.arms)
        own = max(1 - given / 128, 0) if watched or not choice.arm else 1
        spent += sum(costs[arm] for arm in loop.arms) + VISIT * own
        chooser.update(choice, len(loop.arms), loop.histogram, drafted)
        hindsight.push(text[begin + 1 : place + 1])
        chooser.observe_copies(0, 1, hindsight.matched, hindsight.trials)
        arms += loop.arms
    return spent / (len(text) - 1), arms


class Loop:
    """The device's loop: its steps with a choice, from a place in a text on."""

    def __init__(self, text: list[int], place: int, choice: Choice, *, watched: bool) -> None:
        self.text, self.place, self.choice = text, place, choice
        self.histogram, self.arms = np.zeros((1, 32), int), []
        # Plain steps lost by all copies, and by those of this passage.
        self.lost, self.passage = 0.0, None
        while len(self.arms) < choice.steps and place < len(text) - 1:
            if not choice.arm:
                if watched and len(self.arms) >= 4 and self.matched() >= choice.alert:
                    break
                self.take(0)
            elif not watched:
                if self.arms and self.lost + choice.cost - 1 > choice.allowance:
                    break
                self.lost = max(self.lost + choice.cost - self.take(choice.arm), 0)
            else:
                self.copy_or_not()
            place = self.place

    def copy_or_not(self) -> None:
        """Copies after a match, as long as nothing is lost, or takes a plain step."""
        if self.passage is None and self.matched() >= self.choice.alert:
            self.passage = 0.0
        affordable = self.lost + self.choice.cost - 1 <= self.choice.allowance + 1e-3
        if self.passage is None or not affordable:
            self.take(0)
            return
        loss = self.choice.cost - self.take(self.choice.arm)
        self.lost = max(self.lost + loss, 0)
        self.passage = None if self.passage + loss > 0 else 0.0

    def take(self, arm: int) -> int:
        """Takes a step, and gives its number of tokens."""
        right = copied(self.text, self.place, ARMS[arm].depth) if ARMS[arm].family else 0
        given = min(right + 1, len(self.text) - 1 - self.place)
        self.histogram[0, given - 1] += 1
        self.place += given
        self.arms.append(arm)
        return given

    def matched(self) -> int:
        """Tokens that agree with the place that would be copied from."""
        text, place = self.text, self.place
        for size in (3, 2, 1):
            for end in range(place - 1, size - 2, -1):
                if text[end - size + 1 : end + 1] == text[place - size + 1 : place + 1]:
                    agreeing = 0
                    while agreeing < min(16, end + 1) and text[end - agreeing] == text[place - agreeing]:
                        agreeing += 1
                    return agreeing
        return 0


def copied(text: list[int], place: int, depth: int) -> int:
    """Accepted tokens of a copy from the latest place that agrees with the last three tokens, two or one."""
    for size in (3, 2, 1):
        for end in range(place - 1, size - 2, -1):
            if text[end - size + 1 : end + 1] == text[place - size + 1 : place + 1]:
                period, accepted = place - end, 0
                while accepted < depth and place + 1 + accepted < len(text):
                    if text[place + 1 + accepted] != text[end + 1 + accepted % period]:
                        break
                    accepted += 1
                return accepted
    return 0


def in_circles(rng: np.random.Generator, tokens: int) -> list[int]:
    """Goes round in circles after a while, as greedy texts of small models do."""
    begin, circle = rng.integers(0, 500, 60).tolist(), rng.integers(0, 500, 23).tolist()
    return (begin + circle * (tokens // 23 + 1))[:tokens]


def new(rng: np.random.Generator, tokens: int) -> list[int]:
    """Repeats itself by chance alone."""
    return rng.integers(0, 300, tokens).tolist()


def few_letters(rng: np.random.Generator, tokens: int) -> list[int]:
    """Every short context has been there before, and says nothing."""
    return rng.integers(0, 4, tokens).tolist()


def teasing(rng: np.random.Generator, tokens: int) -> list[int]:
    """Repeats passages of two to twelve tokens, and goes on in another way, over and over."""
    text = rng.integers(0, 300, 30).tolist()
    while len(text) < tokens:
        begin, size = int(rng.integers(0, len(text) - 12)), int(rng.integers(2, 13))
        text += [*text[begin : begin + size], int(rng.integers(300, 600))]
    return text[:tokens]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("kind", [in_circles, new, few_letters, teasing])
def test_no_text_loses_more_than_the_account_allows(kind: Text, costs: tuple[float, ...], watched: bool) -> None:
    """Syncs with the host included, beyond those that plain decoding makes too."""
    for seed in range(4):
        for tokens in (200, 800):
            spent, _ = decode(kind(np.random.default_rng(seed), tokens), costs, watched=watched)
            # Only where long matches lead astray the account is overdrawn.
            credit = CREDIT if kind is teasing else 0
            assert spent <= 1 + RATE + (ALLOWANCE + credit + 2 * VISIT) / tokens + 1e-9
            assert 1 / spent >= (0.93 if credit else 0.965)


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
def test_circles_are_found_soon(costs: tuple[float, ...]) -> None:
    """Nearly as fast as if chains of 16 nodes were known to be right from the second round on."""
    for seed in range(4):
        for tokens, share in ((200, 0.8), (1000, 0.85)):
            spent, arms = decode(in_circles(np.random.default_rng(seed), tokens), costs)
            known = (83 + (tokens - 83) / 16 * costs[6]) / tokens
            assert known / spent > share
    # Most steps of a long passage take long chains.
    assert np.bincount([arm for arm in arms if arm], minlength=len(ARMS))[6:].sum() > len([a for a in arms if a]) / 2


def test_streams_pay_for_no_sync_of_their_own() -> None:
    """Where the text is asked for every few steps anyway, the account is as full after a long new text as before it."""
    chooser = Chooser(ARMS, COSTS["small"].__getitem__, 1, copies=COPIES, visit_cost=VISIT)
    for _ in range(200):
        choice = chooser.choose(np.ones(1, bool), range(1, len(ARMS)), 8)
        assert choice[:2] == (0, 8)
        chooser.update(choice, 8, np.array([[8]]))
    assert chooser.balance == pytest.approx(ALLOWANCE + RATE * 1600)


def test_the_match_decides() -> None:
    """The same evidence, and another place in the text: nothing to copy from, a short match, a long one."""
    chooser = Chooser(ARMS, COSTS["small"].__getitem__, 1, copies=COPIES)
    running, found = np.ones(1, bool), []
    for matched in (0, 1, 3, 6, 12, 40):
        chooser.observe_copies(0, 1, matched, [])
        found.append(chooser.values(running)[4:])
    assert found[0] == [1 / cost for cost in COSTS["small"][4:]]
    assert all(list(each) == sorted(each) for each in zip(*found, strict=True))
    assert chooser.choose(running, range(1, len(ARMS)), 128).arm in (6, 7)
    chooser.begin_row(0)
    assert chooser.choose(running, range(1, len(ARMS)), 128).arm == 0


def test_copies_that_were_wrong_are_trusted_less() -> None:
    """Of each length of match apart: after long ones it is still copied."""
    chooser = Chooser(ARMS, COSTS["avx2"].__getitem__, 1, copies=COPIES)
    running = np.ones(1, bool)
    chooser.observe_copies(0, 1, 6, [])
    before = chooser.values(running)[5]
    chooser.observe_copies(0, 1, 6, [(6, False), (7, False)] * 10)
    assert chooser.values(running)[5] < 0.7 * before
    chooser.observe_copies(0, 1, 32, [])
    assert chooser.values(running)[5] > 2


def test_texts_teach_each_other() -> None:
    learned = Evidence.none(1, *evidence_shape(ARMS))
    decode(in_circles(np.random.default_rng(1), 400), COSTS["small"], learned)
    known = learned.copy_shares(None, 4.0)[0, 1]
    assert known.shape == (len(MATCHES),)
    assert (known >= Evidence.none(1, 2, len(MATCHES)).copy_shares(None, 4.0)[0, 1]).sum() >= 6
    chooser = Chooser(ARMS, COSTS["small"].__getitem__, 1, copies=COPIES, learned=learned)
    alone = Chooser(ARMS, COSTS["small"].__getitem__, 1, copies=COPIES)
    for each in (chooser, alone):
        each.observe_copies(0, 1, 4, [])
    assert chooser.values(np.ones(1, bool))[6] > 1.2 * alone.values(np.ones(1, bool))[6]


def watching(costs: tuple[float, ...], visit_cost: float = VISIT) -> Chooser:
    """Of a loop that can look for matches itself."""
    switches = {"copies": COPIES, "alerting": COPIES, "switching": SWITCHING}
    return Chooser(ARMS, costs.__getitem__, 1, visit_cost=visit_cost, **switches)


def test_plain_steps_end_at_a_match_for_which_a_shape_would_be_compiled() -> None:
    """A longer one where copies were wrong or cost more, none where they cannot pay; not at once again."""
    running = np.ones(1, bool)
    cheap, dear = watching(COSTS["avx512"]), watching(COSTS["small"])
    first = cheap.choose(running, (), 128)
    assert first[:2] == (0, 128)
    assert first.alert < dear.choose(running, (), 128).alert < NO_ALERT
    assert watching((1.0, *[40.0] * 7)).choose(running, (), 128).alert == NO_ALERT
    cheap.observe_copies(0, 1, 0, [(length, False) for length in (2, 3, 4, 6)] * 20)
    assert first.alert < cheap.choose(running, (), 128).alert
    dear.update(dear.choose(running, (), 128), 10, np.array([[10]]))
    again = dear.choose(running, (), 128)
    assert again.alert == NO_ALERT
    dear.update(again, again.steps, np.array([[again.steps]]))
    assert dear.choose(running, (), 128).alert < NO_ALERT


def test_a_compiled_shape_waits_for_matches_by_itself() -> None:
    """For long, from a match on that would pay, however dear a look of the host is; other drafts that pay go on."""
    running, ready = np.ones(1, bool), range(4, len(ARMS))
    for visit_cost in (VISIT, 4.0):
        chooser = watching(COSTS["avx512"], visit_cost)
        choice = chooser.choose(running, ready, 128)
        assert choice.arm in ready
        assert (choice.steps, choice.cost, choice.allowance) == (128, COSTS["avx512"][choice.arm], ALLOWANCE)
        assert 1 <= choice.alert <= 16
    chooser.observe_copies(0, 1, 0, [(length, False) for length in MATCHES] * 40)
    assert chooser.choose(running, ready, 128).arm == 0
    heads = watching(COSTS["avx512"])
    heads.observe(0, 0, np.array([0, 0, 0, 40.0]))
    assert heads.choose(running, range(1, len(ARMS)), 128)[:2] == (3, ARM_STEPS)
    heads.observe_copies(0, 1, 32, [(32, True)] * 40)
    assert heads.choose(running, range(1, len(ARMS)), 128)[0] in ready


def test_longer_shapes_are_compiled_where_matches_were_long() -> None:
    """By all that there were, not by the place in the text where the host happens to look; by none in a new text."""
    running = np.ones(1, bool)
    for lengths, found in (((1, 2), None), ((4, 6, 8, 12, 16, 32), 5)):
        chooser = watching(COSTS["small"])
        assert chooser.wanted(running, ()) is None
        chooser.observe_copies(0, 1, 0, [(length, length > 2) for length in lengths] * 30)
        assert chooser.wanted(running, (4,)) in ((found, found + 1) if found else (None,))
    assert chooser.wanted(running, range(4, len(ARMS))) is None


def phrases(rng: np.random.Generator, tokens: int) -> list[int]:
    """Comes back to a few phrases of a dozen tokens, with others between them."""
    known = rng.integers(0, 300, (3, 12)).tolist()
    text: list[int] = []
    while len(text) < tokens:
        text += [*known[int(rng.integers(0, 3))], *rng.integers(300, 600, 6).tolist()]
    return text[:tokens]


def test_short_passages_pay_where_the_loop_finds_them() -> None:
    """Where the host looks for each of them, it costs what they save."""
    texts = [phrases(np.random.default_rng(seed), 400) for seed in (1, 2)]
    alone = np.mean([decode(text, COSTS["avx2"], watched=True)[0] for text in texts])
    looked_for = np.mean([decode(text, COSTS["avx2"])[0] for text in texts])
    assert alone < 0.85
    assert alone < looked_for - 0.1


def test_a_shape_that_is_too_dear_to_be_taken_takes_no_other_ones_place() -> None:
    """Compiled or not: a text that was written before was decoded plainly where chains of 32 nodes cost nine steps."""
    costs = (*COSTS["small"][:-2], 5.8, ALLOWANCE + CREDIT + 2)
    chooser = Chooser(ARMS, costs.__getitem__, 1, copies=COPIES, visit_cost=VISIT)
    chooser.observe_copies(0, 1, 40, [(32, True)] * 40)
    running = np.ones(1, bool)
    values = chooser.values(running)
    assert values[6] < MIN_GAIN * values[7]
    for ready in ((), (7,)):
        assert chooser.wanted(running, ready) == 6
    assert chooser.choose(running, (6, 7), 128).arm == 6
