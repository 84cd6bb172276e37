"""Shapes chosen while decoding: in float64 the text is plain decoding's, whatever is compiled when and chosen."""

import numpy as np
import pytest
from support.cells import cells
from support.samples import GROUP, VOCABULARY, KnowingDrafter, build_model, padded

from lin_jax.decoding import Generation, Generator, NgramDrafter, Sampling, UnionDrafter
from lin_jax.decoding.autotune.shapes import draft_shapes
from lin_jax.decoding.autotune.step_costs import ENOUGH, TIMED, StepCosts
from lin_jax.decoding.drafting.drafters.none import NoDrafter
from lin_jax.decoding.engine.programs import ProgramCompiler
from lin_jax.decoding.engine.stop_strings import stop_automaton
from lin_jax.errors import UserError
from lin_jax.models import Llama

pytestmark = pytest.mark.usefixtures("x64")
NEW = 150
LETTERS = [bytes([97 + token % 26]) for token in range(VOCABULARY)]
PROMPTS = [np.random.default_rng(5).integers(0, VOCABULARY, n).tolist() for n in (1, GROUP, 2 * GROUP + 3)]


class Known(StepCosts):
    """Costs that no clock changes."""

    def record(self, shape: int, steps: int, seconds: float, plain_steps: int = 0) -> None:
        """Leaves them as they are."""


def adaptive(model: Llama, drafter: object, costs: tuple[float, ...], **options: object) -> Generator:
    shapes = draft_shapes(drafter, GROUP - 1)
    known = Known([tree.size for tree in shapes.trees])
    known.assumed = [*costs, *[costs[-1]] * (len(shapes.trees) - len(costs))]
    given = {"shapes": shapes, "costs": lambda slots: known, "compiler": ProgramCompiler(background=False)}
    return Generator(model, drafter=drafter, **given | options)


def steps(generation: Generation) -> dict[str, int]:
    return {tree: count for tree, count in generation.steps_by_tree.items() if count}


@pytest.mark.parametrize("sampling", cells([Sampling()], [Sampling(0.8, top_p=0.9)]), ids=["greedy", "sampled"])
@pytest.mark.thorough
def test_the_text_stays_the_same(sampling: Sampling) -> None:
    """Heads that are right, wrong, and right in places, alone and joined; three prompts take turns in two slots."""
    model = build_model("augmented")
    plain = Generator(model).generate(PROMPTS, NEW, sampling=sampling, seed=3)
    truth = padded(PROMPTS, plain.tokens)
    seen = set()
    for right, lookup in ((0.95, False), (0.0, False), (0.5, True)):
        drafter = KnowingDrafter(truth, 2, right)
        if lookup:
            drafter = UnionDrafter(drafter, NgramDrafter(depth=4, matches=2, lookback=64))
        done = adaptive(model, drafter, (1.0, 1.05, 1.1)).generate(PROMPTS, NEW, sampling=sampling, seed=3, slots=2)
        assert done.tokens == plain.tokens
        assert done.accepted_histogram @ np.arange(1, len(done.accepted_histogram) + 1) == 3 * (NEW - 1)
        seen |= set(steps(done))
    assert "none" in seen
    assert len(seen) >= 3


def test_what_pays_is_used_and_what_does_not_is_left() -> None:
    """Costs decide together with acceptance; a drafter that is never right costs no more than the account allows."""
    model = build_model("augmented")
    plain = Generator(model).generate(PROMPTS[:1], NEW)
    truth = padded(PROMPTS[:1], plain.tokens)
    good = KnowingDrafter(truth, 2, 1.0)
    good.rank[...] = np.zeros_like(truth)
    done = adaptive(model, good, (1.0, 1.3, 1.4)).generate(PROMPTS[:1], NEW)
    assert done.tokens == plain.tokens
    assert done.mean_accepted_tokens > 3
    dear = adaptive(model, good, (1.0, 5.1, 5.2)).generate(PROMPTS[:1], NEW)
    assert steps(dear) == {"none": NEW - 1}
    bad = adaptive(model, KnowingDrafter(truth, 2, 0.0), (1.0, 1.5, 2.0)).generate(PROMPTS[:1], NEW)
    tried = sum(count for tree, count in steps(bad).items() if tree != "none")
    assert 1 <= tried <= 5
    assert bad.plain_steps == NEW - 1 - tried


def test_shapes_are_timed_before_they_are_used() -> None:
    """On copies of the state, of which the text shows nothing; a shape that turns out to be too dear is not taken."""
    model = build_model("augmented")
    plain = Generator(model).generate(PROMPTS[:1], NEW)
    good = KnowingDrafter(padded(PROMPTS[:1], plain.tokens), 2, 1.0)
    good.rank[...] = 0
    shapes = draft_shapes(good, 1)
    costs = StepCosts([tree.size for tree in shapes.trees], timed=True)
    generator = Generator(
        model, drafter=good, shapes=shapes, costs=lambda slots: costs, compiler=ProgramCompiler(background=False)
    )
    assert generator.generate(PROMPTS[:1], NEW).tokens == plain.tokens
    assert len(costs.measured[1]) >= TIMED
    assert not costs.is_unknown(1)
    dear = StepCosts([tree.size for tree in shapes.trees], [[], [9.0] * ENOUGH], timed=True)
    generator.costs = lambda slots: dear
    assert steps(generator.generate(PROMPTS[:1], NEW)) == {"none": NEW - 1}


def test_where_a_look_of_the_host_costs_too_much_nothing_is_made_ready_for_drafts() -> None:
    """As in very small models: the loop is that of plain decoding, but for texts so long that drafts could pay."""
    model, drafter = build_model("augmented"), NgramDrafter(depth=3, matches=2, lookback=64)
    shapes = draft_shapes(drafter, GROUP - 1)
    costs = StepCosts([tree.size for tree in shapes.trees], visit=16.0)
    generator = Generator(
        model, drafter=drafter, shapes=shapes, costs=lambda slots: costs, compiler=ProgramCompiler(background=False)
    )
    scheduler = generator.stream(PROMPTS[:1], 40)
    assert isinstance(scheduler.spec.drafter, NoDrafter)
    for _ in scheduler:
        pass
    assert scheduler.generation.tokens == Generator(model).generate(PROMPTS[:1], 40).tokens
    assert steps(scheduler.generation) == {"none": 39}
    assert generator.stream(PROMPTS[:1], 2000).spec.adaptive


@pytest.mark.thorough
def test_stops_inside_an_accepted_run() -> None:
    model = build_model("augmented")
    plain = Generator(model).generate(PROMPTS[1:2], NEW).tokens
    text = "".join(LETTERS[token].decode() for token in plain[0])
    stops = stop_automaton((text[60:64],), LETTERS)
    drafter = KnowingDrafter(padded(PROMPTS[1:2], plain), 2, 1.0)
    for generator in (Generator(model, stops=stops), adaptive(model, drafter, (1.0, 1.0, 1.0), stops=stops)):
        done = generator.generate(PROMPTS[1:2], NEW)
        assert done.endings == ["stop string"]
        assert len(done.tokens[0]) == text.find(text[60:64]) + 4


def test_compilation_does_not_hold_up_the_text() -> None:
    """Tokens come while nothing but plain decoding is compiled; later calls have what was compiled by then."""
    model = build_model("augmented")
    drafter = NgramDrafter(depth=3, matches=2, lookback=64)
    prompt = [3, 1, 4, 1, 5] * 8
    wanted: list[object] = []

    class Late(ProgramCompiler):
        """Compiles only when it is told to."""

        def request(self, key: object, compile_program: object) -> None:
            """Remembers the first request."""
            wanted[:] = wanted or [(key, compile_program)]

    late = Late()
    generator = adaptive(model, drafter, (1.0, 1.1, 1.2), compiler=late)
    first = generator.generate([prompt], 60)
    assert steps(first) == {"none": 59}
    assert len(wanted) == 1
    ((key, compile_program),) = wanted
    ProgramCompiler.request(late, key, compile_program)
    late.wait()
    assert late.is_ready(key)
    again = generator.generate([prompt], 60)
    assert again.tokens == first.tokens


def test_a_program_that_cannot_be_compiled_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("too large\nand more")

    compiler = ProgramCompiler()
    for _ in range(2):
        compiler.request("key", fail)
        compiler.wait()
    assert not compiler.is_ready("key")
    assert [record.message for record in caplog.records] == [
        "a draft shape cannot be compiled and is left out (too large)"
    ]


def test_options_that_exclude_each_other() -> None:
    model = build_model("augmented")
    drafter = NgramDrafter()
    with pytest.raises(UserError, match="a tree and shapes to choose among are both given"):
        adaptive(model, drafter, (1.0, 1.1), tree=draft_shapes(drafter, 3).trees[1])
    with pytest.raises(UserError, match="acceptance 'typical' depends on the tree"):
        adaptive(model, drafter, (1.0, 1.1), acceptance="typical")


def test_shapes_of_every_drafter() -> None:
    """Chains for each drafter of a union at ranks of its own, none deeper than can be verified."""
    ngram = draft_shapes(NgramDrafter(matches=4))
    assert [arm.depth for arm in ngram.arms] == [0, 1, 3, 7]
    assert set(ngram.hindsight) == ngram.alerting == {0}
    assert ngram.switching == {1, 2, 3}
    heads = KnowingDrafter(np.zeros((1, 8), np.int32), 2, 0.6)
    joined = draft_shapes(UnionDrafter(heads, NgramDrafter(matches=4)), 3, extra=ngram.trees[1])
    assert [arm.family for arm in joined.arms] == [0, 0, 0, 1, 1]
    assert [tree.paths[0] for tree in joined.trees[1:]] == [(0,), (0,), (3,), (3,)]
    assert set(joined.hindsight) == {1}
    assert joined.switching == {3, 4}
    assert max(arm.depth for arm in joined.arms) == 3
    assert draft_shapes(heads, 0).trees == ngram.trees[:1]
    assert len(draft_shapes(heads, 3, extra=joined.trees[3]).trees) == 4
