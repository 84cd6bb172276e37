"""A tree that does not pay gives way to plain decoding, and the text is the same."""

import numpy as np
import pytest
from support.cells import cells
from support.samples import GROUP, TREE, VOCABULARY, KnowingDrafter, build_model, padded

from lin_jax.decoding import Generator, Sampling
from lin_jax.decoding.autotune.fallback import (
    CHECK_EVERY,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    SpeculationFallback,
    mean_and_error,
)

GOOD, BAD = np.array([2, 0, 14]), np.array([15, 1, 0])


def test_mean_and_error_are_those_of_the_steps() -> None:
    steps = np.repeat([1, 2, 3], [5, 2, 9])
    mean, error = mean_and_error(np.array([5, 2, 9]))
    assert mean == pytest.approx(steps.mean())
    assert error == pytest.approx(steps.std() / np.sqrt(steps.size))


def test_what_pays_goes_on() -> None:
    fallback = SpeculationFallback(2.0)
    for _ in range(20):
        assert fallback.steps_until_check(1000) == CHECK_EVERY
        fallback.update(CHECK_EVERY, GOOD)
        assert fallback.drafts


def test_what_does_not_pay_rests_ever_longer() -> None:
    fallback, rests = SpeculationFallback(2.0), []
    for _ in range(8):
        fallback.update(CHECK_EVERY, BAD)
        assert not fallback.drafts
        rests.append(fallback.steps_until_check(10**6))
        assert fallback.steps_until_check(5) == 5
        fallback.update(rests[-1] - 1, np.array([rests[-1] - 1, 0, 0]))
        assert not fallback.drafts
        fallback.update(1, np.array([1, 0, 0]))
        assert fallback.drafts
    assert rests == [min(FIRST_PAUSE * 2**turn, LONGEST_PAUSE) for turn in range(8)]
    fallback.update(CHECK_EVERY, GOOD)
    assert fallback.drafts
    fallback.update(CHECK_EVERY, BAD)
    assert fallback.steps_until_check(10**6) == FIRST_PAUSE


def test_little_evidence_decides_nothing() -> None:
    fallback = SpeculationFallback(2.0)
    fallback.update(2, np.array([1, 0, 1]))
    assert fallback.drafts
    fallback.update(2, np.array([0, 0, 0]))
    assert fallback.drafts


def test_a_tree_without_a_claim_stays() -> None:
    fallback = SpeculationFallback(None)
    fallback.update(CHECK_EVERY, BAD)
    assert fallback.drafts
    assert fallback.steps_until_check(1000) == 1000


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sampling", cells([Sampling()], [Sampling(0.8, top_p=0.9)]), ids=["greedy", "sampled"])
@pytest.mark.thorough
def test_the_text_stays_the_same(sampling: Sampling) -> None:
    """Drafts begin, give way, and are tried again; three prompts take turns in two slots."""
    model, new = build_model("augmented"), 3 * FIRST_PAUSE
    prompts = [np.random.default_rng(5).integers(0, VOCABULARY, n).tolist() for n in (1, GROUP, 2 * GROUP + 3)]
    plain = Generator(model).generate(prompts, new, sampling=sampling, seed=3)
    drafter = KnowingDrafter(padded(prompts, plain.tokens), 2, 0.6)
    always = Generator(model, drafter=drafter, tree=TREE).generate(prompts, new, sampling=sampling, seed=3, slots=2)
    assert always.tokens == plain.tokens
    assert always.plain_steps == 0
    wanting = Generator(model, drafter=drafter, tree=TREE, break_even_tokens=TREE.depth + 2)
    done = wanting.generate(prompts, new, sampling=sampling, seed=3, slots=2)
    assert done.tokens == plain.tokens
    assert done.plain_steps >= FIRST_PAUSE
    assert sum(done.accepted_histogram[1:]) > CHECK_EVERY
    assert done.nodes < always.nodes


def test_only_an_exact_acceptance_gives_way() -> None:
    """Plain decoding would write other tokens than a lossy one."""
    drafter = KnowingDrafter(np.zeros((1, 8), np.int32), 2, 0.6)
    options = {"drafter": drafter, "tree": {1: TREE, 4: TREE}, "break_even_tokens": {1: 1.5}}
    model = build_model("augmented", dtype="float32")
    assert [Generator(model, **options).break_even_for(slots) for slots in (1, 3, 4)] == [1.5, 1.5, None]
    assert Generator(model, **options, acceptance="typical").break_even_for(1) is None
