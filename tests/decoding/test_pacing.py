"""A tree that does not pay gives way to plain decoding, and the text is the same."""

import numpy as np
import pytest
from cells import cells
from samples import GROUP, TREE, VOCABULARY, KnowingDrafter, build_model, padded

from lin_jax.decoding import Generator, Sampling
from lin_jax.decoding.pacing import LONGEST_REST, LOOK, REST, Pace, mean_and_error

GOOD, BAD = np.array([2, 0, 14]), np.array([15, 1, 0])


def test_mean_and_error_are_those_of_the_steps() -> None:
    steps = np.repeat([1, 2, 3], [5, 2, 9])
    mean, error = mean_and_error(np.array([5, 2, 9]))
    assert mean == pytest.approx(steps.mean())
    assert error == pytest.approx(steps.std() / np.sqrt(steps.size))


def test_what_pays_goes_on() -> None:
    pace = Pace(2.0)
    for _ in range(20):
        assert pace.visit(1000) == LOOK
        pace.learn(LOOK, GOOD)
        assert pace.drafts


def test_what_does_not_pay_rests_ever_longer() -> None:
    pace, rests = Pace(2.0), []
    for _ in range(8):
        pace.learn(LOOK, BAD)
        assert not pace.drafts
        rests.append(pace.visit(10**6))
        assert pace.visit(5) == 5
        pace.learn(rests[-1] - 1, np.array([rests[-1] - 1, 0, 0]))
        assert not pace.drafts
        pace.learn(1, np.array([1, 0, 0]))
        assert pace.drafts
    assert rests == [min(REST * 2**turn, LONGEST_REST) for turn in range(8)]
    pace.learn(LOOK, GOOD)
    assert pace.drafts
    pace.learn(LOOK, BAD)
    assert pace.visit(10**6) == REST


def test_little_evidence_decides_nothing() -> None:
    pace = Pace(2.0)
    pace.learn(2, np.array([1, 0, 1]))
    assert pace.drafts
    pace.learn(2, np.array([0, 0, 0]))
    assert pace.drafts


def test_a_tree_without_a_claim_stays() -> None:
    pace = Pace(None)
    pace.learn(LOOK, BAD)
    assert pace.drafts
    assert pace.visit(1000) == 1000


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sampling", cells([Sampling()], [Sampling(0.8, top_p=0.9)]), ids=["greedy", "sampled"])
def test_the_text_stays_the_same(sampling: Sampling) -> None:
    """Drafts begin, give way, and are tried again; three prompts take turns in two slots."""
    model, new = build_model("augmented"), 3 * REST
    prompts = [np.random.default_rng(5).integers(0, VOCABULARY, n).tolist() for n in (1, GROUP, 2 * GROUP + 3)]
    plain = Generator(model).generate(prompts, new, sampling=sampling, seed=3)
    drafter = KnowingDrafter(padded(prompts, plain.tokens), 2, 0.6)
    always = Generator(model, drafter=drafter, tree=TREE).generate(prompts, new, sampling=sampling, seed=3, slots=2)
    assert always.tokens == plain.tokens
    assert always.plain_steps == 0
    wanting = Generator(model, drafter=drafter, tree=TREE, worth=TREE.depth + 2)
    done = wanting.generate(prompts, new, sampling=sampling, seed=3, slots=2)
    assert done.tokens == plain.tokens
    assert done.plain_steps >= REST
    assert sum(done.yields[1:]) > LOOK
    assert done.nodes < always.nodes


def test_only_an_exact_acceptance_gives_way() -> None:
    """Plain decoding would write other tokens than a lossy one."""
    drafter = KnowingDrafter(np.zeros((1, 8), np.int32), 2, 0.6)
    options = {"drafter": drafter, "tree": {1: TREE, 4: TREE}, "worth": {1: 1.5}}
    model = build_model("augmented", dtype="float32")
    assert [Generator(model, **options).worth_for(slots) for slots in (1, 3, 4)] == [1.5, 1.5, None]
    assert Generator(model, **options, acceptance="typical").worth_for(1) is None
