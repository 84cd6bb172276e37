"""Suffix drafter over a session: output is plain output in float64, and what was written before is drafted whole."""

import numpy as np
import pytest
from flax import nnx
from support.cells import cells
from support.samples import GROUP, NEW, VOCABULARY, build_model

from lin_jax.decoding import (
    AnyTree,
    CopyDrafter,
    DraftTree,
    DynamicTree,
    Generator,
    LikeliestDrafter,
    NgramDrafter,
    PathDrafter,
    Sampling,
    SuffixDrafter,
    TextMemory,
    UnionDrafter,
    chain,
)
from lin_jax.decoding.autotune.shapes import draft_shapes
from lin_jax.decoding.autotune.step_costs import ENOUGH, StepCosts
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.suffix_index import MAX_MATCH
from lin_jax.decoding.drafting.tree import tree_text
from lin_jax.decoding.engine.programs import ProgramCompiler
from lin_jax.models import Llama, PathHead

pytestmark = pytest.mark.usefixtures("x64")
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(0.9, top_p=0.95), "penalised": Sampling(repetition_penalty=1.4)}
DEPTH = GROUP - 1


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCABULARY, n).tolist() for n in (1, GROUP - 1, 2 * GROUP + 3, 45, 3)]


def ways(model: Llama, memory: TextMemory) -> dict[str, tuple[Drafter, AnyTree]]:
    """The suffix drafter alone and joined with a head that was never trained."""
    suffix = SuffixDrafter(memory, depth=DEPTH, matches=3, lookback=64)
    path = PathDrafter(PathHead.on(model, 8, nnx.Rngs(1)), width=2)
    return {
        "chain": (suffix, chain(DEPTH)),
        "dynamic": (suffix, DynamicTree(9, DEPTH, 2, 2)),
        "path/suffix": (LikeliestDrafter(path, suffix), chain(DEPTH)),
        "path+suffix": (UnionDrafter(path, suffix), DraftTree(((0,), (2,), (2, 2), (2, 2, 2), (2, 2, 2, 0), (3,)))),
    }


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("way", "mode"),
    cells(
        [("path/suffix", "sampled")],
        [
            ("chain", "sampled"),
            ("path/suffix", "greedy"),
            ("chain", "penalised"),
            ("dynamic", "sampled"),
            ("dynamic", "greedy"),
            ("path+suffix", "sampled"),
        ],
    ),
)
def test_three_passes(prompts: list[list[int]], way: str, mode: str) -> None:
    """Five prompts at once, three times, with draft lengths that differ by row."""
    model, sampling, memory = build_model(), SAMPLINGS[mode], TextMemory(1024)
    drafter, tree = ways(model, memory)[way]
    plain = Generator(model, prefill_chunk_size=32)
    generator = Generator(model, drafter=drafter, tree=tree, memory=memory, prefill_chunk_size=32)
    expected = plain.generate(prompts, NEW, sampling=sampling, seed=3).tokens
    accepted = []
    for _ in range(3):
        found = generator.generate(prompts, NEW, sampling=sampling, seed=3)
        assert found.tokens == expected
        accepted.append(found.mean_accepted_tokens)
    ends = {tuple([*prompt[-MAX_MATCH:], *text]) for prompt, text in zip(prompts, expected, strict=True)}
    assert {tuple(text) for text in memory.texts} == ends
    # The last step of a row may find less than it drafted; the path head's guess shares this tree.
    most = (NEW - 1) / -(-(NEW - 1) // (tree.depth + 1))
    if way != "path+suffix":
        assert accepted[1] > 0.9 * most
    assert accepted[1] > 1.5 * accepted[0]


def test_rows_of_unequal_drafts(prompts: list[list[int]]) -> None:
    """In one batch, prompts that are known draft to the end, and others as their own text goes."""
    model, memory = build_model(), TextMemory(1024)
    drafter = SuffixDrafter(memory, depth=DEPTH, lookback=64)
    generator = Generator(model, drafter=drafter, tree=chain(DEPTH), memory=memory, prefill_chunk_size=32)
    sampling = Sampling(1.0)
    generator.generate(prompts[2:4], NEW, sampling=sampling, first_row=2, slots=8)
    together = generator.generate(prompts, NEW, sampling=sampling)
    assert together.tokens == Generator(model, prefill_chunk_size=32).generate(prompts, NEW, sampling=sampling).tokens
    known, new = together.steps[2:4], [*together.steps[:2], together.steps[4]]
    assert max(known) <= 6 < 20 < min(new)


@pytest.mark.thorough
def test_a_later_prompt_of_one_call_knows_the_earlier(prompts: list[list[int]]) -> None:
    """The same prompt again and again in a single slot: from the second on it is drafted whole."""
    model, memory = build_model(), TextMemory(1024)
    drafter = SuffixDrafter(memory, depth=DEPTH, lookback=64)
    generator = Generator(model, drafter=drafter, tree=chain(DEPTH), memory=memory, prefill_chunk_size=32)
    # Enough tokens for the memory to sort them in on the way.
    found = generator.generate([prompts[3]] * 3, 600, slots=1)
    assert found.tokens[0] == found.tokens[1] == found.tokens[2]
    assert found.steps[1] == found.steps[2] <= 1.1 * 600 / (DEPTH + 1)


@pytest.mark.thorough
def test_an_evicted_text_is_not_drafted(prompts: list[list[int]]) -> None:
    """A memory of one text forgets it for the next, and the output is the same."""
    model, memory = build_model(), TextMemory(MAX_MATCH + NEW + 1)
    drafter = SuffixDrafter(memory, depth=DEPTH, lookback=64)
    generator = Generator(model, drafter=drafter, tree=chain(DEPTH), memory=memory, prefill_chunk_size=32)
    sampling, one, other = Sampling(1.0), prompts[3:4], prompts[2:3]
    first, again = (generator.generate(one, NEW, sampling=sampling) for _ in range(2))
    generator.generate(other, NEW, sampling=sampling)
    forgotten = generator.generate(one, NEW, sampling=sampling)
    assert first.tokens == again.tokens == forgotten.tokens
    assert again.steps[0] < first.steps[0] / 3 < forgotten.steps[0]
    assert len(memory.texts) == 1


@pytest.mark.parametrize("kind", cells(["copy"], ["suffix"]))
def test_what_is_chosen_while_decoding_finds_the_memory(prompts: list[list[int]], kind: str) -> None:
    """Chains from memory are left alone in new texts, and taken in known ones; the text is plain decoding's."""
    model, memory = build_model(), TextMemory(2048)
    reader = CopyDrafter(memory) if kind == "copy" else SuffixDrafter(memory, lookback=64)
    drafter = UnionDrafter(NgramDrafter(depth=3, lookback=64), reader)
    shapes = draft_shapes(drafter, DEPTH, memory=memory)
    assert set(shapes.hindsight) == {0, 1}
    # What has a memory to copy from as well does not wait for a match with the text.
    assert {shapes.arms[number].family for number in shapes.switching} == {0}
    # As in a model with weights that take longer to read than a sync with the host; no clock changes them.
    sizes = [tree.size for tree in shapes.trees]
    costs = StepCosts(sizes, [[1 + 0.2 * (size - 1)] * ENOUGH for size in sizes], visit=1.5)
    generator = Generator(
        model,
        drafter=drafter,
        shapes=shapes,
        costs=lambda slots: costs,
        compiler=ProgramCompiler(background=False),
        memory=memory,
        prefill_chunk_size=32,
    )
    sampling, own = Sampling(1.0), {tree_text(shapes.trees[at]) for at, arm in enumerate(shapes.arms) if arm.family}
    plain = Generator(model, prefill_chunk_size=32).generate(prompts[:2], 90, sampling=sampling)
    first, second = (generator.generate(prompts[:2], 90, sampling=sampling) for _ in range(2))
    assert first.tokens == second.tokens == plain.tokens
    assert not any(first.steps_by_tree.get(tree, 0) for tree in own)
    assert sum(second.steps_by_tree.get(tree, 0) for tree in own) > 5
    assert max(second.steps) < 90 / 3 < min(first.steps)


@pytest.mark.thorough
def test_large_memories_are_sorted_seldom() -> None:
    """Beside a large memory, few new tokens are not worth sorting all anew, unless it is asked for."""
    memory, rng = TextMemory(2**15), np.random.default_rng(0)
    for _ in range(20):
        memory.add(rng.integers(0, 99, 1000).tolist())
    memory.refresh()
    before = int(memory.index.get_value().filled)
    memory.add([1, 2, 3])
    memory.refresh(cheaply=True)
    assert int(memory.index.get_value().filled) == before
    assert memory.contexts.tokens[-4:] != [1, 2, 3, -1]
    memory.refresh()
    assert memory.contexts.tokens[-4:] == [1, 2, 3, -1]
    assert int(memory.index.get_value().filled) == sum(len(text) - 1 for text in memory.texts)
