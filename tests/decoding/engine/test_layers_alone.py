"""Large models layer by layer, in float64, against programs of all layers; here, every model is a large one."""

from collections.abc import Iterator

import numpy as np
import pytest
from flax import nnx
from support.cells import cells
from support.samples import NEW, TREE, VOCABULARY, KnowingDrafter, build_model, padded

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import Generation, Generator, NgramDrafter, PathDrafter, Sampling, chain
from lin_jax.decoding.autotune.shapes import draft_shapes
from lin_jax.decoding.autotune.step_costs import StepCosts
from lin_jax.decoding.engine import layers_alone, plain_by_layers
from lin_jax.decoding.engine.programs import Flat, ProgramCompiler
from lin_jax.models import CausalModel, PathHead, SeparateLayers

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, VOCABULARY, length).tolist() for length in (1, 40, 9)]
SLIDING = {"name": "softmax", "window": 3}
MIXED = AttentionConfig("augmented", 8, 5, initial_alpha=0.3, layers={1: SLIDING})


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Makes all models large; holds the steps that are taken layer by layer."""
    steps: list[int] = []
    step = plain_by_layers._step

    def noted(*arguments):
        steps.append(1)
        return step(*arguments)

    monkeypatch.setattr(plain_by_layers, "_step", noted)
    monkeypatch.setattr(layers_alone, "LARGE", 0)
    monkeypatch.setattr(layers_alone, "VERY_LARGE", 0)
    return steps


def alone(model: CausalModel) -> CausalModel:
    model.layers = SeparateLayers.of(model.layers)
    return model


def assert_same(found: Generation, expected: Generation) -> None:
    assert found.tokens == expected.tokens
    assert found.endings == expected.endings
    assert found.steps == expected.steps
    np.testing.assert_array_equal(found.accepted_histogram, expected.accepted_histogram)


@pytest.mark.parametrize("attention", cells(["augmented"], [("softmax",), (MIXED,)]))
def test_plain_decoding_is_the_same(attention, taken: list[int]) -> None:
    """With prompts that wait for a row, stops, filters and penalties, and log-probabilities."""
    options = {"sampling": Sampling(0.9, top_p=0.95, repetition_penalty=1.3), "seed": 4, "slots": 2, "log_probs": True}
    model = build_model(attention, layers=3)
    expected = Generator(model, prefill_chunk_size=32, end_tokens=[3]).generate(PROMPTS, NEW, **options)
    assert not taken
    assert len(set(expected.endings)) == 2
    generator = Generator(alone(model), prefill_chunk_size=32, end_tokens=[3])
    found = generator.generate(PROMPTS, NEW, **options)
    assert taken
    assert_same(found, expected)
    for one, other in zip(found.log_probs, expected.log_probs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    # Once programs are there, a call takes the steps of its tokens alone.
    generator.generate(PROMPTS[:1], 4)
    taken.clear()
    assert generator.generate(PROMPTS[:1], 4).steps == [3]
    assert len(taken) == 3


def test_drafts_stand_on_a_prompt_that_was_read_so(taken: list[int]) -> None:
    """A head that reads the outputs of a layer between, too."""
    model = build_model(layers=3)
    model.aux_layers = (1,)
    head = PathHead.on(model, 8, nnx.Rngs(1), layers=(1,))
    options = {"drafter": PathDrafter(head), "tree": chain(3), "prefill_chunk_size": 32}
    expected = Generator(model, **options).generate(PROMPTS, NEW)
    found = Generator(alone(model), **options).generate(PROMPTS, NEW)
    assert_same(found, expected)
    plain = Generator(model, prefill_chunk_size=32).generate(PROMPTS, NEW)
    assert taken
    assert plain.tokens == expected.tokens


@pytest.mark.parametrize("background", cells([True], [(False,)]))
def test_adaptive_decoding_begins_without_the_loop_of_all_layers(background: bool, taken: list[int]) -> None:
    """That is compiled while decoding goes on, or at once where nothing may depend on a clock."""
    model = alone(build_model())
    plain = Generator(model).generate(PROMPTS[:1], 200).tokens
    drafter = NgramDrafter(depth=3, matches=2, lookback=64)
    shapes = draft_shapes(drafter, 7)
    costs = StepCosts([tree.size for tree in shapes.trees])
    compiler = ProgramCompiler(background=background)
    generator = Generator(model, drafter=drafter, shapes=shapes, costs=lambda slots: costs, compiler=compiler)
    taken.clear()
    assert generator.generate(PROMPTS[:1], 200).tokens == plain
    # One step compiles what the steps need.
    assert len(taken) > 1 if background else len(taken) == 1
    compiler.wait()
    taken.clear()
    assert generator.generate(PROMPTS[:1], 200).tokens == plain
    assert not taken or background


@pytest.mark.thorough
def test_drafts_of_any_quality_change_nothing(taken: list[int]) -> None:
    model = alone(build_model())
    plain = Generator(model, prefill_chunk_size=32).generate(PROMPTS, NEW).tokens
    assert taken
    drafter = KnowingDrafter(padded(PROMPTS, plain), 2, 0.7)
    assert Generator(model, drafter=drafter, tree=TREE, prefill_chunk_size=32).generate(PROMPTS, NEW).tokens == plain


@pytest.mark.parametrize("new", cells([], [(50,), (200,)]))
def test_a_model_that_is_not_very_large_gets_a_loop_for_long_texts(
    new: int, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_alone, "VERY_LARGE", 2**29)
    model, compiler = build_model(), ProgramCompiler(background=False)
    expected = Generator(model, compiler=compiler).generate(PROMPTS, new, slots=2).tokens
    assert not taken
    assert Generator(alone(model), compiler=compiler).generate(PROMPTS, new, slots=2).tokens == expected
    taken.clear()
    compiler = ProgramCompiler(background=False)
    assert Generator(model, compiler=compiler).generate(PROMPTS, new, slots=3).tokens == expected
    # One step compiles what the steps need.
    assert len(taken) == (1 if new == 200 else 50)


def test_small_models_and_those_of_the_same_bits_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    model = alone(build_model())
    assert not layers_alone.runs_by_layers(Flat.of(model))
    monkeypatch.setattr(layers_alone, "LARGE", 0)
    assert layers_alone.runs_by_layers(Flat.of(model))
    model.same_bits = True
    assert not layers_alone.runs_by_layers(Flat.of(model))
    assert not layers_alone.runs_by_layers(Flat.of(build_model()))
