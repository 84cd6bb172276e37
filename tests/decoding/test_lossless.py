"""Speculative output is plain output, token for token, in float64: greedy and sampled, whatever the drafts are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells, some_of
from support.samples import GROUP, NEW, TREE, VOCABULARY, KnowingDrafter, build_model, padded

from lin_jax.decoding import (
    DraftTree,
    DynamicTree,
    Generator,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
    PathDrafter,
    Sampling,
    SelfDrafter,
    TokenOrigin,
    UnionDrafter,
    chain,
)
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.tree import AnyTree
from lin_jax.models import Llama, MedusaHeads, PathHead

pytestmark = pytest.mark.usefixtures("x64")
SAMPLINGS = {
    "greedy": Sampling(),
    "filtered": Sampling(0.8, top_k=9, top_p=0.9, min_p=0.02),
    "penalised": Sampling(0.9, repetition_penalty=1.4),
}


GUESSES = ("no guess", "ngram", "medusa", "path", "model", "self", "medusa and ngram", "path and ngram")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, VOCABULARY, n).tolist() for n in (1, GROUP - 1, GROUP, 2 * GROUP + 3, 30)]


def knowing(truth: np.ndarray) -> dict[str, tuple[Drafter, AnyTree]]:
    """Drafters of all qualities."""
    return {
        "always wrong": (KnowingDrafter(truth, 0, 0.0), TREE),
        "always right": (KnowingDrafter(truth, 1, 1.0), TREE),
        "half right": (KnowingDrafter(truth, 2, 0.6), TREE),
    }


def guessing(model: Llama) -> dict[str, tuple[Drafter, AnyTree]]:
    """Every drafter of the package, none of them trained."""
    medusa = MedusaDrafter(MedusaHeads.on(model, 4), width=2)
    path = PathDrafter(PathHead.on(model, 8, nnx.Rngs(1)), width=3)
    ngram = NgramDrafter(depth=5, matches=3, lookback=32)
    both = DraftTree(((0,), (1,), (2,), (0, 0), (2, 2), (2, 2, 2), (0, 0, 1)))
    return {
        "no guess": (NgramDrafter(depth=4, matches=1, lookback=1), chain(3)),
        "ngram": (ngram, DraftTree(((0,), (1,), (0, 0), (1, 0), (0, 0, 0)))),
        "medusa": (medusa, chain(4)),
        "path": (path, TREE),
        "model": (ModelDrafter(build_model("relu", seed=3)), DraftTree(((0,), (1,), (0, 0), (1, 0), (1, 0, 0)))),
        "self": (SelfDrafter(model, [1]), DynamicTree(7, 3, 2, 2)),
        "medusa and ngram": (UnionDrafter(medusa, ngram), both),
        "path and ngram": (UnionDrafter(path, ngram), DynamicTree(8, 4, 3, 4)),
    }


@pytest.mark.users_settings
@pytest.mark.parametrize(
    ("attention", "mode"),
    cells([("augmented", "filtered")], [("augmented", "greedy"), ("softmax", "filtered"), ("augmented", "penalised")]),
)
def test_equals_plain_decoding(attention: str, prompts: list[list[int]], mode: str) -> None:
    """Drafts of all qualities, five prompts in three slots, against plain decoding of all of them at once."""
    model, sampling = build_model(attention), SAMPLINGS[mode]
    plain = Generator(model, prefill_chunk_size=32).generate(prompts, NEW, sampling=sampling, seed=3)
    assert plain.mean_accepted_tokens == 1
    if sampling.temperature:
        other = Generator(model, prefill_chunk_size=32).generate(prompts, NEW, sampling=sampling, seed=4)
        assert other.tokens != plain.tokens
    for name, (drafter, tree) in knowing(padded(prompts, plain.tokens)).items():
        generator = Generator(model, drafter=drafter, tree=tree, prefill_chunk_size=32)
        found = generator.generate(prompts, NEW, sampling=sampling, seed=3, slots=3)
        assert found.tokens == plain.tokens, name
        for row, steps in zip(found.origins, found.steps, strict=True):
            # Every step adds one token of the target's own, but the limit may cut the last one off.
            assert steps + 1 - row.count(TokenOrigin.TARGET) in (0, 1)
            assert row.count(TokenOrigin.TARGET) + row.count(TokenOrigin.DRAFT) == NEW
        if name == "always wrong":
            assert found.mean_accepted_tokens == 1
            assert found.useful_share < 1 / (TREE.size - 1)
        if name == "always right":
            assert found.mean_accepted_tokens > 1.8


@pytest.mark.parametrize("mode", cells(["penalised"], ["filtered"]))
def test_a_dynamic_tree_leaves_the_output(prompts: list[list[int]], mode: str) -> None:
    model, sampling = build_model(), SAMPLINGS[mode]
    plain = Generator(model, prefill_chunk_size=32).generate(prompts, NEW, sampling=sampling, seed=3).tokens
    drafter = KnowingDrafter(padded(prompts, plain), 2, 0.6)
    generator = Generator(model, drafter=drafter, tree=DynamicTree(9, 4, 3, 3), prefill_chunk_size=32)
    found = generator.generate(prompts, NEW, sampling=sampling, seed=3, slots=3)
    assert found.tokens == plain
    assert found.mean_accepted_tokens > 1


@pytest.mark.thorough
@pytest.mark.parametrize("name", some_of(GUESSES, {"path"}))
def test_every_drafter_leaves_the_output(prompts: list[list[int]], name: str) -> None:
    model, sampling = build_model(), SAMPLINGS["penalised"]
    plain = Generator(model, prefill_chunk_size=32).generate(prompts, NEW, sampling=sampling, seed=3).tokens
    drafter, tree = guessing(model)[name]
    generator = Generator(model, drafter=drafter, tree=tree, prefill_chunk_size=32)
    found = generator.generate(prompts, NEW, sampling=sampling, seed=3)
    assert found.tokens == plain
    assert (found.mean_accepted_tokens > 1) == (name != "no guess")


@pytest.mark.parametrize("acceptance", cells(["exact"], ["rejection"]))
def test_a_head_on_several_layers_and_few_tokens(prompts: list[list[int]], acceptance: str) -> None:
    """It drafts only what it has, in a tree; the output is plain decoding's, or has its distribution."""
    model, sampling, tokens = build_model(), SAMPLINGS["penalised"], range(0, VOCABULARY, 2)
    plain = Generator(model, prefill_chunk_size=32).generate(prompts, NEW, sampling=sampling, seed=3).tokens
    model.aux_layers = (0,)
    head = PathHead.on(model, 8, nnx.Rngs(1), layers=(0,), tokens=tokens)
    head.projection[...] += 0.1 * jax.random.normal(jax.random.key(0), head.projection.shape)
    options = {"drafter": PathDrafter(head, width=3), "tree": TREE, "acceptance": acceptance, "prefill_chunk_size": 32}
    found = Generator(model, **options).generate(prompts, NEW, sampling=sampling, seed=3)
    assert found.mean_accepted_tokens > 1
    drafted = {
        token
        for row, origins in zip(found.tokens, found.origins, strict=True)
        for token, origin in zip(row, origins, strict=True)
        if origin == TokenOrigin.DRAFT
    }
    assert drafted <= set(tokens)
    assert (found.tokens == plain) == (acceptance == "exact")


@pytest.mark.thorough
def test_a_model_drafts_for_itself(prompts: list[list[int]]) -> None:
    """A draft model that is the target, and all of the target's own layers, are always right, whatever the groups."""
    model = build_model()
    for drafter in (ModelDrafter(model), SelfDrafter(model, range(2))):
        generator = Generator(model, drafter=drafter, tree=chain(3), prefill_chunk_size=32)
        found = generator.generate(prompts, 1 + 4 * 9)
        assert found.mean_accepted_tokens == 4
        assert found.useful_share == pytest.approx(len(prompts) / 8)
        assert found.acceptance_by_depth == [1, 1, 1]


@pytest.mark.thorough
def test_rows_do_not_depend_on_the_batch(prompts: list[list[int]]) -> None:
    """A prompt gives the same tokens alone, in a batch, and at another place of it."""
    model = build_model()
    sampling = SAMPLINGS["filtered"]
    generator = Generator(model, drafter=NgramDrafter(depth=3), prefill_chunk_size=32)
    together = generator.generate(prompts, 12, sampling=sampling, seed=1).tokens
    for row, prompt in list(enumerate(prompts))[:3]:
        assert generator.generate([prompt], 12, sampling=sampling, seed=1, first_row=row).tokens == [together[row]]


@pytest.mark.thorough
def test_state_is_that_of_plain_decoding(prompts: list[list[int]]) -> None:
    """When rows have written as much, their states are equal, whatever was accepted on the way."""
    model = build_model()
    plain = Generator(model, prefill_chunk_size=32)
    truth = padded(prompts, plain.generate(prompts, NEW).tokens)
    for right in (0.0, 0.5, 1.0):
        speculative = Generator(model, drafter=KnowingDrafter(truth, 11, right), tree=TREE, prefill_chunk_size=32)
        states = []
        for generator in (plain, speculative):
            scheduler = generator.stream(prompts, NEW)
            scheduler.advance(NEW)
            states.append(scheduler.state.decode_state.model)
        one, other = states
        np.testing.assert_array_equal(one.position, other.position)
        np.testing.assert_allclose(one.memory, other.memory, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(one.window, other.window, rtol=1e-12, atol=1e-12)
        used = jnp.arange(GROUP) < one.position[..., None] % GROUP
        for part in ("keys", "values"):
            a, b = (jnp.where(used[..., None, None], getattr(state, part), 0) for state in states)
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.thorough
def test_log_probabilities_are_the_models(prompts: list[list[int]]) -> None:
    """Of every token, drafted or not, given the whole text before it, without temperature or filters."""
    model = build_model()
    path = PathDrafter(PathHead.on(model, 8, nnx.Rngs(1)))
    generator = Generator(model, drafter=path, tree=chain(3), prefill_chunk_size=32)
    found = generator.generate(prompts, 9, sampling=SAMPLINGS["filtered"], log_probs=True)
    assert found.log_probs is not None
    for prompt, tokens, told in zip(prompts, found.tokens, found.log_probs, strict=True):
        text = jnp.asarray([prompt + tokens])
        expected = jax.nn.log_softmax(model(text)[0, len(prompt) - 1 : -1])
        np.testing.assert_allclose(told, expected[jnp.arange(9), jnp.asarray(tokens)], atol=1e-10)


@pytest.mark.thorough
def test_typical_acceptance_is_another_text(prompts: list[list[int]]) -> None:
    """It accepts more than the exact rule, and every token it emits is likely or the target's choice."""
    model = build_model()
    path = PathDrafter(PathHead.on(model, 16, nnx.Rngs(1)))
    plain = Generator(model, prefill_chunk_size=32).generate(prompts, NEW)
    lossy = Generator(model, drafter=path, tree=chain(3), acceptance="typical", prefill_chunk_size=32).generate(
        prompts, NEW
    )
    exact = Generator(model, drafter=path, tree=chain(3), prefill_chunk_size=32).generate(prompts, NEW)
    assert exact.tokens == plain.tokens != lossy.tokens
    assert lossy.mean_accepted_tokens > exact.mean_accepted_tokens


@pytest.mark.thorough
def test_rejection_has_the_targets_distribution() -> None:
    """In the loop: the first tokens of many rows are distributed as those of plain sampling (chi-square)."""
    from scipy.stats import chi2_contingency

    model, rows = build_model(), 2048
    sampling = Sampling(0.7, top_k=6)
    drafter = PathDrafter(PathHead.on(model, 12, nnx.Rngs(1)))
    tree = DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0)))
    prompts = [[3, 1, 4, 1, 5]] * rows
    drawn = Generator(model, drafter=drafter, tree=tree, acceptance="rejection", prefill_chunk_size=32)
    found = drawn.generate(prompts, 4, sampling=sampling, seed=1, slots=rows)
    plain = Generator(model, prefill_chunk_size=32).generate(prompts, 4, sampling=sampling, seed=2, slots=rows)
    assert found.mean_accepted_tokens > 1.1
    for place in range(1, 4):
        table = np.array(
            [np.bincount([row[place] for row in each.tokens], minlength=VOCABULARY) for each in (found, plain)]
        )
        table = table[:, table.sum(axis=0) >= 20]
        assert chi2_contingency(table).pvalue > 0.001
